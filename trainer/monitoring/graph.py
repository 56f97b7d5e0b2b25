"""The model as a graph, for TensorBoard's tab Graphs."""

import keras
import tensorflow as tf

# TensorBoard's page lays out some thousand nodes within seconds. GPT-2 with 48 layers has about 5,000.
MAX_NODES = 10_000


def graph_of(model: keras.Model, sequence_length: int) -> bytes | None:
    """Returns the operations from tokens to logits as a serialized GraphDef; None if they are too many to be shown.

    Nothing is computed and no variable is read: each variable is a placeholder, so it makes no difference on which
    devices the variables are.

    Args:
        model: the model.
        sequence_length: the tokens that it reads.
    """
    variables = model.variables

    def logits(tokens: tf.Tensor, values: list[tf.Tensor]) -> tf.Tensor:
        with keras.StatelessScope(state_mapping=[*zip(variables, values, strict=True)]):
            return tf.identity(model(tokens, training=False), "logits")

    tokens = tf.TensorSpec([1, sequence_length], tf.int32, "tokens")
    specs = [tf.TensorSpec(each.shape, each.dtype, each.path) for each in variables]
    graph = tf.function(logits, autograph=False).get_concrete_function(tokens, specs).graph.as_graph_def()
    if len(graph.node) > MAX_NODES:
        return None
    paths = {each.path for each in variables}
    layers = {layer for path in paths for layer in path.split("/")[:-1]}

    def beside_its_weights(name: str) -> str:
        """Returns the name of an operation in the scopes of the weights of its layer, so that the page draws both in
        one box. TensorFlow has numbered the scopes of operations, because the placeholders had these names before. The
        scope of the whole model is left out: the layers are what the page shows first.
        """
        *scopes, last = name.split("/")
        if name not in paths:
            scopes = [part[:-2] if part.endswith("_1") and part[:-2] in layers else part for part in scopes]
        return "/".join([*(scopes[1:] if scopes[:1] == [model.name] else scopes), last])

    del graph.node[-1]  # "Identity", with which every function ends.
    for node in graph.node:
        node.name = beside_its_weights(node.name)
        node.input[:] = map(beside_its_weights, node.input)
    return graph.SerializeToString()
