"""Names of settings in other toolkits."""

from __future__ import annotations

# Used only to suggest our names; never accepted.
SYNONYMS: dict[str, str] = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "blr": "lr",
    "min_learning_rate": "min_lr",
    "weight_decay_rate": "weight_decay",
    "gradient_accumulation_steps": "micro_batch_size",
    "accumulate_grad_batches": "micro_batch_size",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "gradient_clip_val": "clip_norm",
    "max_grad_norm": "clip_norm",
    "mixed_precision": "precision",
    "beam_size": "num_beams",
    "min_length": "min_new_tokens",
    "max_length": "max_new_tokens",
    "lora_r": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "num_workers": "workers",
    "path": "root",
    "data_dir": "root",
    "output_dir": "output",
    "embed_dim": "d_model",
    "num_layers": "depth",
}
