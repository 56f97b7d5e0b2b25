"""The forward pass and the backward pass of a block as two programs that get the weights from outside, so that weights
need not stay in memory between them.

What the backward pass needs of what the forward pass made of the batch is handed over. What follows from weights, from
positions or from the draws of dropout alone is made again. Or the backward pass computes the whole block again, and
only its input stays.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.model.block import Block
from trainer.model.held import RunBlock

# Operations that return the numbers of their input, in another shape or dtype.
_VIEWS = frozenset({"Cast", "ExpandDims", "Identity", "Reshape", "Squeeze", "StopGradient"})
# XLA computes these within the operation that reads them, and writes their results only if something else keeps them.
_WITHIN_ANOTHER = _VIEWS | {
    *("Abs", "Add", "AddN", "AddV2", "BiasAdd", "BroadcastTo", "ConcatV2", "Erf", "Exp", "GreaterEqual", "IsFinite"),
    *("Less", "Log", "Log1p", "LogicalAnd", "Maximum", "Minimum", "Mul", "Neg", "Pad", "Pow", "RealDiv", "Reciprocal"),
    *("Relu", "Rsqrt", "Select", "SelectV2", "Sigmoid", "Slice", "Split", "SplitV", "Sqrt", "Square"),
    *("SquaredDifference", "StridedSlice", "Sub", "Tanh", "Transpose"),
}


class BlockPasses(NamedTuple):
    """A block that stands for all, as two functions of tensors.

    Attributes:
        forward: takes (place, x, *weights); returns what the block at a place makes of x, and what it hands over.
        backward: takes (place, upstream, x, *handed over, *weights); returns the gradients of x and of each weight, in
            the dtype of its variable, given that of what the block makes.
        handed_over: what is handed over.
    """

    forward: Callable[..., list[tf.Tensor]]
    backward: Callable[..., list[tf.Tensor]]
    handed_over: tuple[tf.TensorSpec, ...] = ()


def passes_that_compute_again(block: Block, run: RunBlock) -> BlockPasses:
    """Returns passes of which the forward one hands nothing over.

    Args:
        block: the block.
        run: computes it.
    """

    def forward(place: tf.Tensor, x: tf.Tensor, *weights: tf.Tensor) -> list[tf.Tensor]:
        return [called(functools.partial(run, block, place), block.trainable_variables, weights, x)]

    def backward(*arguments: tf.Tensor) -> list[tf.Tensor]:
        return _both(block, run, *arguments)[1:]

    return BlockPasses(forward, backward)


def passes_that_keep(
    block: Block, run: RunBlock, x: tf.TensorSpec, weights: Sequence[tf.TensorSpec], is_compiled: bool
) -> BlockPasses:
    """Returns passes of which the forward one hands over what the backward one needs, so that no product is computed
    again. Call it where the passes run: `run` may use tensors from there.

    Args:
        block: the block.
        run: computes it.
        x: what it reads, and of the shape of what it makes.
        weights: what it gets for its weights.
        is_compiled: whether XLA compiles the passes. Then the backward pass computes again what takes XLA no time.
    """
    signature = [tf.TensorSpec([], tf.int32), x, x, *weights]
    whole = tf.function(functools.partial(_both, block, run), autograph=False).get_concrete_function(*signature)
    place, upstream, given, *values = whole.inputs[: len(signature)]
    outside = dict(zip(map(id, whole.inputs[len(signature) :]), whole.captured_inputs, strict=True))
    result, *gradients = whole.outputs
    between = _between(given.op, result.op, [each.op for each in gradients], is_compiled)

    def part(inputs: Sequence[tf.Tensor], outputs: Sequence[tf.Tensor]) -> Callable[..., list[tf.Tensor]]:
        def run_part(*arguments: tf.Tensor) -> list[tf.Tensor]:
            return _copied(outputs, outside | dict(zip(map(id, inputs), arguments, strict=True)))

        return run_part

    return BlockPasses(
        part([place, given, *values], [result, *between]),
        part([place, upstream, given, *between, *values], gradients),
        tuple(tf.TensorSpec(each.shape, each.dtype) for each in between),
    )


def called(
    call: Callable[[tf.Tensor], Any], variables: Sequence[keras.Variable], values: Sequence[tf.Tensor], x: tf.Tensor
) -> Any:
    """Returns call(x), in which variables have these values."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        for variable, value in zip(variables, values, strict=True):
            # An update, because a mapping would cast the value to the dtype of the variable.
            scope.add_update((variable, value))
        return call(x)


def _both(
    block: Block, run: RunBlock, place: tf.Tensor, upstream: tf.Tensor, x: tf.Tensor, *weights: tf.Tensor
) -> list[tf.Tensor]:
    """Returns what the block at a place makes of x, and the gradients of x and of each weight."""
    variables = block.trainable_variables
    with tf.GradientTape() as tape:
        tape.watch([x, *weights])
        result = called(functools.partial(run, block, place), variables, weights, x)
    of_x, *of_weights = tape.gradient(result, [x, *weights], upstream)
    pairs = zip(of_weights, variables, strict=True)
    return [result, of_x, *(tf.cast(gradient, variable.dtype) for gradient, variable in pairs)]


def _between(
    x: tf.Operation, result: tf.Operation, gradients: Sequence[tf.Operation], is_compiled: bool
) -> list[tf.Tensor]:
    """Returns the tensors on the way from x to the result that the gradients need. What is made of others at no cost,
    or does not follow from x, such as a weight in another shape or a mask, is left to be made again.
    """
    follows_x, leads_to_result, waiting = {x}, {result}, [result]
    for op in x.graph.get_operations():
        if any(each.op in follows_x for each in _inputs(op)):
            follows_x.add(op)
    while waiting:
        new = {each.op for each in _inputs(waiting.pop())} - leads_to_result
        leads_to_result |= new
        waiting += new
    between = (follows_x & leads_to_result) - {x}
    found: dict[str, tf.Tensor] = {}
    seen, waiting = set(gradients), list(gradients)
    while waiting:
        for each in _inputs(waiting.pop()):
            if each.op in between and not _is_free(each.op, is_compiled):
                found[each.name] = each
            elif each.op not in seen:
                seen.add(each.op)
                waiting.append(each.op)
    return list(found.values())


def _is_free(op: tf.Operation, is_compiled: bool) -> bool:
    """Whether making an operation's result again takes no time, and keeping its inputs no more memory."""
    if is_compiled:
        return op.type in _WITHIN_ANOTHER
    is_narrowing = op.type == "Cast" and op.inputs[0].dtype.size > op.outputs[0].dtype.size
    return op.type in _VIEWS and not is_narrowing


def _copied(outputs: Sequence[tf.Tensor], known: Mapping[int, tf.Tensor]) -> list[tf.Tensor]:
    """Copies the operations that lead from known tensors to the outputs into the default graph. Copies follow the data
    alone, so there must be no operation with a state.

    Args:
        outputs: tensors of another graph.
        known: what stands for its tensors here, by their ids.

    Returns:
        The copies of the outputs.

    Raises:
        ValueError: an operation has a state.
    """
    graph, found, needed = tf.compat.v1.get_default_graph(), dict(known), set()
    waiting = [each for each in outputs if id(each) not in found]
    while waiting:
        op = waiting.pop().op
        if op not in needed:
            needed.add(op)
            waiting += [each for each in _inputs(op) if id(each) not in found]
    for op in outputs[0].graph.get_operations():  # Every operation comes after those that it reads.
        if op in needed:
            if op.op_def.is_stateful:
                raise ValueError(
                    f"{op.name}: {op.type} has a state, and a block's passes cannot be cut apart around it."
                )
            attributes = {name: value for name, value in op.node_def.attr.items() if name != "_class"}
            dtypes = [each.dtype for each in op.outputs]
            with tf.device(op.device):
                copy = graph.create_op(
                    op.type, [found[id(each)] for each in _inputs(op)], dtypes, name=op.name, attrs=attributes
                )
            for old, new in zip(op.outputs, copy.outputs, strict=True):
                new.set_shape(old.shape)
                found.setdefault(id(old), new)
    return [found[id(each)] for each in outputs]


def _inputs(op: tf.Operation) -> list[tf.Tensor]:
    """Returns the tensors that an operation reads. A tf.custom_gradient returns its results by way of an IdentityN that
    holds its arguments, too, which nothing reads: this looks through it.
    """
    inputs = list(op.inputs)
    for i, each in enumerate(inputs):
        while each.op.type == "IdentityN":
            each = each.op.inputs[each.value_index]
        inputs[i] = each
    return inputs
