"""The operations that cost less in another form when TensorFlow runs them one by one on a CPU."""

import dataclasses
import functools
import math
from collections.abc import Callable
from importlib import metadata

import tensorflow as tf

from trainer.model.activations import ACTIVATIONS, Activation, computed_again, gelu, gelu_tanh, swiglu
from trainer.model.attention import cached_attention
from trainer.model.normalization import Passes, make_passes, normalize
from trainer.model.ops.plain import Ops
from trainer.model.precision import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class CpuOps(Ops):
    """Reads and writes memory less often: in place, in one pass, and by matrix products, which are fast."""

    def norm(self, x: tf.Tensor, kind: str, epsilon: float, gamma: tf.Tensor, *beta: tf.Tensor) -> tf.Tensor:
        """Normalizes float [..., width], each pass over it compiled by XLA."""
        return normalize(_compiled_passes(kind, epsilon), x, gamma, *beta)

    def activation(self, name: str) -> Activation:
        """Returns an activation whose passes XLA compiles; ReLU, which is a single operation, as it is."""
        return _ACTIVATIONS[name]

    def add_bias(self, rows: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        """Adds bias [width] to float [rows, width]. The gradient sums over the rows by a product, which is faster."""

        @tf.custom_gradient
        def add(rows: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, object]:
            def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                return upstream, tf.matmul(tf.ones([1, tf.shape(upstream)[0]], upstream.dtype), upstream)[0]

            return tf.nn.bias_add(rows, bias), gradient

        return add(rows, bias)

    def subtract_at(self, x: tf.Tensor, places: tf.Tensor, updates: tf.Tensor) -> tf.Tensor:
        """Subtracts updates [n] from x at places int32 [n, rank of x]; in place if nothing reads x any more."""
        # The plain form copies all of x first. XLA lacks this operation.
        return tf.raw_ops.ScatterNdNonAliasingAdd(input=x, indices=places, updates=-updates)

    def keep_or_recompute(self, kept: tf.Tensor, make: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Calls make again, so that nothing holds kept, and the last operation that reads kept may overwrite it."""
        return make()


def in_one_pass(function: Callable) -> Callable:
    """Makes a function of tensors read and write memory once; TensorFlow would at each operation.

    It is for functions without variables whose operations XLA can fuse. Products of matrices are faster without it.
    """
    compiled = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def call(*args: tf.Tensor) -> object:
        # With an unknown shape, or in an eager call, every new shape would be compiled again.
        is_static = tf.inside_function() and all(arg.shape.is_fully_defined() for arg in args)
        return compiled(*args) if is_static and _can_compile() else function(*args)

    return call


def means_by_product(rows: tf.Tensor) -> tf.Tensor:
    """Returns the mean of each row of float [rows, width], as [rows, 1]. An accelerator could not fuse it."""
    width = rows.shape[-1]
    return tf.matmul(rows, tf.fill([width, 1], tf.constant(1 / width, rows.dtype)))


@functools.cache
def _can_compile() -> bool:
    """Whether TensorFlow has a compiler for the CPU: tensorflow-tpu lacks it."""
    try:
        metadata.version("tensorflow-tpu")
    except metadata.PackageNotFoundError:
        return True
    return False


@functools.cache
def _compiled_passes(kind: str, epsilon: float) -> Passes:
    return make_passes(kind, epsilon, means_by_product, in_one_pass)


_ACTIVATIONS = ACTIVATIONS | {
    "gelu": computed_again(gelu, in_one_pass),
    "gelu_tanh": computed_again(gelu_tanh, in_one_pass),
    "swiglu": computed_again(swiglu, in_one_pass),
}


@dataclasses.dataclass(frozen=True)
class CpuDecodingOps(CpuOps):
    """Decodes on a CPU, without gradients: fewer operations for a single new token of each text.

    A single text is bound by reading the weights, which products compiled by XLA do faster. Several texts are computed
    by operations one by one: their products are faster, and XLA would compile for each number of texts.
    """

    def compiles_blocks(self, x: tf.Tensor) -> bool:
        """Whether x [batch, new, width] is a single position of a single text, in a dtype that XLA is fast in."""
        return x.shape[:2] == [1, 1] and x.dtype.size >= tf.float32.size and _can_compile()

    def activation(self, name: str) -> Activation:
        """Returns an activation without a gradient; GELU in a form that TensorFlow fuses with the product before it."""
        return _gelu if name == "gelu" else ACTIVATIONS[name]

    def cached_attention(self, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
        """Attends from new positions to what a cache holds; see `trainer.model.attention.cached_attention`."""
        return cached_attention(query, key, value, allowed, _product_by_eigen if query.shape[2] == 1 else None)

    def logits(self, hidden: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Maps float [batch, sequence, width] to [batch, sequence, num_logits] by kernel [num_logits, width]."""
        if hidden.shape[1] != 1:
            return super().logits(hidden, kernel)
        # The larger matrix stands on the left as it lies in memory: with few texts, the fastest of all arrangements.
        by_token = _product_by_eigen(kernel, hidden[:, 0], transpose_b=True)
        return tf.transpose(by_token)[:, tf.newaxis]


def _product_by_eigen(x: tf.Tensor, y: tf.Tensor, transpose_b: bool = False) -> tf.Tensor:
    """Multiplies as `tf.matmul` does, but never by oneDNN, which is slower in products of a single row."""
    return tf.raw_ops.BatchMatMulV3(x=x, y=y, Tout=x.dtype, adj_y=transpose_b)


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """Returns `trainer.model.activations.gelu` of x, by the operations that grappler's remapper looks for."""
    wide = tf.cast(x, accumulation_dtype(x.dtype))
    return tf.cast(0.5 * wide * (1.0 + tf.math.erf(wide * math.sqrt(0.5))), x.dtype)
