"""Triton kernels of the directional scan. `triton_engine` calls them in order and says what each tensor is.

Tensors of one direction are kept in the order in which that direction visits the tokens, `[K, b, l, d]`: only the
convolution and the sum over directions look at the index map. One program scans a few channels over all tokens, with
the state in registers; the tokens of a published image (197) are far too few for a parallel scan to pay.

`N` (the SSM state size) must be a power of two. All arithmetic is fp32 whatever the type of the tensors, but for matrix
products: that of `dt_forward` takes operands of the tensors' own type, and those by which the backward scan forms sums
take tf32 where the tensors have 16 bits (three products, which give fp32, where they have 32).
"""

from emrrg_cli.models.scan.kernels.backward import finish_BC, scan_backward
from emrrg_cli.models.scan.kernels.convolution import conv_backward, conv_forward
from emrrg_cli.models.scan.kernels.forward import scan_forward
from emrrg_cli.models.scan.kernels.pointwise import dt_forward, gate_backward, gate_forward, sum_directions

__all__ = [
    "conv_backward",
    "conv_forward",
    "dt_forward",
    "finish_BC",
    "gate_backward",
    "gate_forward",
    "scan_backward",
    "scan_forward",
    "sum_directions",
]
