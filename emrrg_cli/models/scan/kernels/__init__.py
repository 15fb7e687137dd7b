"""Triton kernels of the directional scan. `triton_engine` calls them in order and describes each tensor.

Tensors of one direction are kept in the order in which that direction visits the tokens, `[K, b, l, d]`: only the
convolution and the sum over directions look at the index map. One program scans a few channels over all tokens, with
the state in registers; the tokens of a published image (197) are too few for a parallel scan to be faster.

`N` (the SSM state size) must be a power of two. All arithmetic is fp32, except in matrix products: `dt_forward`
multiplies in the dtype of the tensors; the sums of the backward scan use tf32 for 16-bit tensors, and for 32-bit
tensors three tf32 products, which give fp32.
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
