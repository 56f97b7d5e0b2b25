"""Laws of what XLA compiles in a step that TensorFlow runs."""

import pytest
import tensorflow as tf

from trainer.model import one_pass
from trainer.model.one_pass import in_one_pass


@in_one_pass
def twice_and_one(x, y):
    return 2 * x + y


def operations(rows):
    """Returns those of a traced function: of each its type, and whether XLA compiles it whole."""
    spec = tf.TensorSpec([rows, 3])
    graph = tf.function(lambda x, y: twice_and_one(x, y)).get_concrete_function(spec, spec).graph
    return [
        (op.type, any(name == "_XlaMustCompile" and value.b for name, value in op.node_def.attr.items()))
        for op in graph.get_operations()
    ]


def test_a_function_is_compiled_where_its_shapes_are_known():
    assert ("PartitionedCall", True) in operations(4)
    assert ("AddV2", False) in operations(None)


@pytest.fixture
def on_a_host_without_compiler(monkeypatch):
    monkeypatch.setattr(one_pass.metadata, "version", {"tensorflow-tpu": "2.20.0"}.__getitem__)
    one_pass._compiles_for_cpu.cache_clear()
    yield
    one_pass._compiles_for_cpu.cache_clear()


@pytest.mark.usefixtures("on_a_host_without_compiler")
def test_nothing_is_compiled_where_tensorflow_is_the_one_for_tpus():
    assert ("AddV2", False) in operations(4)


def test_values_are_the_same_in_every_way_of_calling():
    x, y = tf.constant([[1.0, 2.0, 3.0]]), tf.constant([[0.5, 0.0, -1.0]])
    for call in (twice_and_one, tf.function(twice_and_one), tf.function(twice_and_one, jit_compile=True)):
        assert call(x, y).numpy().tolist() == [[2.5, 4.0, 5.0]]
