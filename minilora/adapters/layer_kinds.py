"""Which layers can take an adapter, and how each uses its weight.

The equations of the papers know one layer, y = W x with W (out, in). Models store that W in several ways:

    nn.Linear                 weight (out, in)                 y = W x
    NF4Linear                 4-bit codes                      the same, dequantized
    transformers' Conv1D      weight (in, out): GPT-2          y = W x with W the transpose of what is stored
    nn.Embedding              weight (tokens, dim)             y = W x with W the transpose, and x one-hot: a lookup
    nn.Conv1d, 2d, 3d         weight (out, in/groups, kernel)  y = W * x

A LayerKind hides the difference: `weight` reads W as (out, in, *kernel) from a layer, `apply` multiplies x by any such
matrix in the layer's own way, and `with_weight` gives the layer as a dense one that holds another W.
"""

import copy
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import InputError
from minilora.nf4 import NF4Linear, linear_onto


class LayerKind:
    """How one layer uses its weight, without holding it: W stands as (out_features, in_features, *kernel)."""

    is_linear: ClassVar[bool] = True
    is_transposed: ClassVar[bool] = False  # the layer's own weight is (in, out)
    shape: tuple[int, ...]

    def __init__(self, layer: nn.Module) -> None:
        self.shape = (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    def weight(self, layer: nn.Module) -> Tensor:
        """W of the layer, (out, in, *kernel); the layer's own memory where it is stored like that."""
        W = layer.weight
        if not isinstance(W, Tensor) or not W.is_floating_point():
            raise InputError("its weight is not floating-point numbers")
        if W.is_meta and hasattr(layer, "_hf_hook"):
            raise InputError("accelerate has offloaded its weight: take that off with remove_hook_from_submodules")
        return W.T if self.is_transposed else W

    def with_weight(self, layer: nn.Module, W: Tensor, bias: Tensor | None) -> nn.Module:
        """A dense layer that computes what `layer` would with this W (out, in, *kernel) and bias; both are frozen."""
        dense = copy.copy(layer)
        dense._parameters = dict(layer._parameters)
        dense.weight = nn.Parameter(self.stored(W), requires_grad=False)
        if bias is not layer._parameters.get("bias"):
            dense.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return dense

    def stored(self, W: Tensor) -> Tensor:
        """W (out, in, *kernel) in the orientation of the layer's own `weight`; its own inverse."""
        return W.T.contiguous() if self.is_transposed else W

    def require_one_group(self) -> None:
        """Raise InputError where an update (out, in, *kernel) is no change of the layer's weight."""

    def is_computed_by(self, layer: nn.Module) -> bool:
        """False if the layer, of a class with a forward of its own, does something else than W x + b; tried on an x."""
        if type(layer).forward in PLAIN_FORWARDS:
            return True
        W, bias = self.weight(layer), getattr(layer, "bias", None)
        x = self.example(W)
        expected = self.apply(x, W)
        if bias is not None:
            expected = expected + bias.view(-1, *[1] * (len(self.shape) - 2))
        error = (layer(x) - expected).abs().max()
        return bool(error <= 64 * torch.finfo(W.dtype).eps * expected.abs().max())  # rounded twice, in another order

    def example(self, W: Tensor) -> Tensor:
        """An x for the layer with this W; no random number of the program changes."""
        kernel = self.shape[2:]
        return torch.linspace(-1, 1, 2 * self.in_features * math.prod(kernel)).view(2, self.in_features, *kernel).to(W)

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """W x without a bias, for any W of the layer's in_features and kernel, in the dtype of W."""
        return F.linear(x, W)

    def pointwise(self, h: Tensor, B: Tensor, add: Tensor | None = None) -> Tensor:
        """B h (+ add) for what `apply` gave: B (out, r, *1), h with r channels; add as h but with out channels."""
        return linear_onto(add, h, B)


class NF4Kind(LayerKind):
    def weight(self, layer: nn.Module) -> Tensor:
        assert isinstance(layer, NF4Linear)
        return layer.dequantize(torch.float32)

    def with_weight(self, layer: nn.Module, W: Tensor, bias: Tensor | None) -> nn.Module:
        """An nn.Linear."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(W, requires_grad=False)
        dense.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return dense


class TransposedLinearKind(LayerKind):
    """transformers' Conv1D, which is a linear layer that stores W as (in, out)."""

    is_transposed = True

    def __init__(self, layer: nn.Module) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.shape = (weight.shape[1], weight.shape[0])


class EmbeddingKind(LayerKind):
    """A lookup: column x of W, (dim, tokens). x holds token ids."""

    is_linear, is_transposed = False, True

    def __init__(self, layer: nn.Embedding) -> None:
        self.shape = (layer.embedding_dim, layer.num_embeddings)
        self.padding_idx = layer.padding_idx
        self.scale = getattr(layer, "embed_scale", None)  # Gemma multiplies what it looks up

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        return self.look_up(x, W.T, self.padding_idx)

    def example(self, W: Tensor) -> Tensor:
        return torch.arange(self.in_features, device=W.device)

    def look_up(self, x: Tensor, rows: Tensor, padding_idx: int | None) -> Tensor:
        """The rows (tokens, dim) with the numbers x, as the layer gives them; that of padding takes no gradient."""
        y = F.embedding(x, rows, padding_idx)
        return y if self.scale is None else y * torch.as_tensor(self.scale, dtype=rows.dtype, device=rows.device)


class ConvKind(LayerKind):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d; with groups, `shape` is that of the ungrouped convolution, W's is not."""

    is_linear = False

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride, layer.padding, layer.dilation, layer.groups
        )  # fmt: skip
        self.padding_mode, self.pad_by = layer.padding_mode, list(layer._reversed_padding_repeated_twice)

    def require_one_group(self) -> None:
        if self.groups > 1:
            raise InputError(f"with groups={self.groups} it has no dense weight that an update could be added to")

    @property
    def _convolve(self) -> Any:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.shape) - 3]

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """W * x; a W of in/groups channels convolves in groups, as the layer's own does."""
        groups = self.in_features // W.shape[1]
        if self.padding_mode == "zeros":
            return self._convolve(x, W, None, self.stride, self.padding, self.dilation, groups)
        x = F.pad(x, self.pad_by, mode=self.padding_mode)
        return self._convolve(x, W, None, self.stride, 0, self.dilation, groups)

    def pointwise(self, h: Tensor, B: Tensor, add: Tensor | None = None) -> Tensor:
        y = self._convolve(h, B, groups=self.groups)
        return y if add is None else add + y


PLAIN_FORWARDS = {cls.forward for cls in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, NF4Linear)}


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind of a layer that can take an adapter, else None."""
    if isinstance(layer, NF4Linear):
        return NF4Kind(layer)
    if isinstance(layer, nn.Linear):
        return LayerKind(layer)
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # transformers.pytorch_utils, without importing it
        return TransposedLinearKind(layer)
    if isinstance(layer, nn.Embedding) and layer.max_norm is None:  # with max_norm, forward changes the weight
        return EmbeddingKind(layer)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not layer.transposed:
        return ConvKind(layer)
    return None
