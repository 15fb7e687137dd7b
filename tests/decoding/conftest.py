"""The tiny models of the tests of `models`."""

from tests.models.conftest import make_encoder, make_llm, texts, tokenizer

__all__ = ["make_encoder", "make_llm", "texts", "tokenizer"]
