"""What costs a CPU less when TensorFlow runs a step on it an operation at a time.

Only within `operations_on_cpu`: where XLA compiles a step as a whole, as for accelerators, other forms are better.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib import metadata

import keras
import tensorflow as tf

from trainer.hardware.processor import multiplies_bfloat16

_is_on_cpu: ContextVar[bool] = ContextVar("is_on_cpu", default=False)
_is_compiled: ContextVar[bool] = ContextVar("is_compiled", default=True)


@contextlib.contextmanager
def operations_on_cpu(is_on_cpu: bool = True) -> Iterator[None]:
    """Has what is traced inside run by a CPU's own operations, one after the other; not, where that is not so."""
    token = _is_on_cpu.set(is_on_cpu)
    try:
        yield
    finally:
        _is_on_cpu.reset(token)


@contextlib.contextmanager
def operations_one_by_one() -> Iterator[None]:
    """Has what is traced inside run by operations of whatever device it is, without XLA."""
    token = _is_compiled.set(False)
    try:
        yield
    finally:
        _is_compiled.reset(token)


def in_one_pass(function: Callable) -> Callable:
    """Makes a function of tensors read and write memory once, where TensorFlow would at each operation.

    For functions without variables, whose operations XLA can fuse: products of matrices are faster without it.
    """
    compiled = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def call(*args: tf.Tensor) -> object:
        # A shape that is not known yet, or the next call's, would be compiled for every one that comes.
        is_static = tf.inside_function() and all(arg.shape.is_fully_defined() for arg in args)
        return compiled(*args) if is_static and _is_on_cpu.get() and _can_compile() else function(*args)

    return call


def subtract_at(x: tf.Tensor, places: tf.Tensor, updates: tf.Tensor) -> tf.Tensor:
    """Subtracts updates [n] from x at places int32 [n, rank of x]; in place where nothing else reads x any more."""
    if _is_on_cpu.get():
        # The other copies all of x first. XLA does not know this one.
        return tf.raw_ops.ScatterNdNonAliasingAdd(input=x, indices=places, updates=-updates)
    return tf.tensor_scatter_nd_sub(x, places, updates)


def write_at(kept: tf.Tensor, new: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Writes new [batch, heads, new, width] into kept [batch, heads, capacity, width], at the places from index on,
    where that has to be zero; in place where nothing else reads kept any more.
    """
    if _is_compiled.get():
        # Without XLA this would be compiled for each shape by itself, and copy all; and XLA does not know the other.
        return keras.ops.slice_update(kept, (0, 0, index, 0), new)
    (heads, capacity, width), (batch, _, num_new, _) = kept.shape[1:], tf.unstack(tf.shape(new))
    places = tf.range(batch * heads)[:, tf.newaxis] * capacity + index + tf.range(num_new)
    # Of what writes, only what adds does it in place.
    rows = tf.raw_ops.ScatterNdNonAliasingAdd(
        input=tf.reshape(kept, [-1, width]),
        indices=tf.reshape(places, [-1, 1]),
        updates=tf.reshape(new, [-1, width]),
    )
    return tf.reshape(rows, [-1, heads, capacity, width])


def made_again(make: Callable[[], tf.Tensor], made: tf.Tensor) -> tf.Tensor:
    """Returns made; or on a CPU what makes it anew, so that nothing keeps it: its last reader may overwrite it then."""
    return make() if _is_on_cpu.get() else made


def mean_of_rows(rows: tf.Tensor) -> tf.Tensor:
    """Returns the mean of each row of float [rows, width], as [rows, 1]."""
    if _is_on_cpu.get():
        # Faster as a product, which an accelerator's compiler could not fuse.
        width = rows.shape[-1]
        return tf.matmul(rows, tf.fill([width, 1], tf.constant(1 / width, rows.dtype)))
    return tf.reduce_mean(rows, axis=-1, keepdims=True)


def add_bias(x: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """Adds bias [width] to float [..., width]."""
    if not _is_on_cpu.get():
        return tf.nn.bias_add(x, bias)

    @tf.custom_gradient
    def add(x: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, object]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            rows = tf.reshape(upstream, [-1, bias.shape[0]])
            # The sum over the rows: faster as a product.
            return upstream, tf.matmul(tf.ones([1, tf.shape(rows)[0]], rows.dtype), rows)[0]

        return tf.nn.bias_add(x, bias), gradient

    return add(x, bias)


def fast_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype to compute in where a model's compute dtype is dtype: a wider one, which holds all its numbers,
    where the CPU's own arithmetic in 16 bits is slower than that in 32.
    """
    is_slow = dtype == tf.float16 or (dtype == tf.bfloat16 and not multiplies_bfloat16())
    return tf.float32 if is_slow and _is_on_cpu.get() else dtype


@functools.cache
def _can_compile() -> bool:
    """Whether there is a compiler for the CPU: tensorflow-tpu has none for its host."""
    try:
        metadata.version("tensorflow-tpu")
    except metadata.PackageNotFoundError:
        return True
    return False
