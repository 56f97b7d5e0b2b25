"""Laws of the model. The reference is the layers of KerasNLP and, for what these lack, the papers' formulas."""

import itertools

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from trainer.config.settings import ModelConfig
from trainer.model.documents import document_starts
from trainer.model.gpt import GPT

SHAPES = [
    ModelConfig(num_heads=3, hidden_dim=16, intermediate_dim=12),
    ModelConfig(num_heads=2, hidden_dim=16, intermediate_dim=12, pre_norm=True, activation="gelu"),
    ModelConfig(num_heads=2, hidden_dim=16, intermediate_dim=12, tied_embeddings=True, use_bias=False),
    ModelConfig(
        num_heads=4,
        hidden_dim=16,
        intermediate_dim=12,
        pre_norm=True,
        use_bias=False,
        norm="rms",
        positions="rope",
        num_key_value_heads=2,
        activation="swiglu",
    ),
]
MODERN_SHAPES = [
    ModelConfig(
        num_layers=1,
        num_heads=4,
        hidden_dim=16,
        intermediate_dim=12,
        pre_norm=norm == "rms",
        norm=norm,
        positions=positions,
        rope_theta=100.0 if positions == "rope" else 10_000.0,
        num_key_value_heads=key_heads,
        activation=activation,
    )
    for norm, positions, key_heads, activation in itertools.product(
        ("layer", "rms"), ("learned", "rope"), (None, 2), ("relu", "swiglu")
    )
] + [
    # What the families of Hugging Face's models need in addition.
    ModelConfig(num_layers=1, num_heads=3, hidden_dim=8, head_dim=4, intermediate_dim=12, **settings)
    for settings in (
        {"activation": "gelu_tanh", "norm_epsilon": 0.1, "use_bias": False},
        {"positions": "rope", "norm": "rms", "norm_epsilon": 0.1, "use_bias": ("query_key_value",)},
        {"use_bias": ("attention_output", "norm"), "pre_norm": True},
        {"use_bias": ("feedforward", "unembedding"), "activation": "swiglu"},
        {"qk_norm": True, "positions": "rope", "pre_norm": True, "norm_epsilon": 0.1},
    )
]
MASKED_SHAPES = [config.model_copy(update={"document_mask": True}) for config in SHAPES]
BOS = 2

# Windows of packed text, and the places of their documents. The first window begins inside a document, has a document
# that is only a [BOS], and ends with a [BOS]. The second begins with a [BOS].
WINDOWS = np.array(
    [[3, 4, 5, BOS, 6, 7, 8, BOS, BOS, 9, 10, BOS], [BOS, 11, 12, 13, 14, BOS, 15, 16, 17, 18, 19, 3]], np.int32
)
DOCUMENTS = [(0, 0, 3), (0, 3, 7), (0, 7, 8), (0, 8, 11), (0, 11, 12), (1, 0, 5), (1, 5, 12)]


def tutorial_model(config, vocabulary_size, sequence_length):
    """The tutorial's model, from KerasNLP's layers."""
    inputs = keras.layers.Input(shape=(None,), dtype="int32")
    x = keras_nlp.layers.TokenAndPositionEmbedding(vocabulary_size, sequence_length, config.hidden_dim)(inputs)
    for _ in range(config.num_layers):
        x = keras_nlp.layers.TransformerDecoder(
            config.intermediate_dim, config.num_heads, activation=config.activation, normalize_first=config.pre_norm
        )(x)
    return keras.Model(inputs, keras.layers.Dense(vocabulary_size)(x))


def copy_weights(model, reference):
    """Gives a KerasNLP model the weights of ours."""
    values = {variable.path.removeprefix("gpt/"): variable.numpy() for variable in model.variables}
    heads, width = model.config.num_heads, model.config.head_width()
    _, embedding, *decoders, dense = reference.layers
    embedding.set_weights([values["token_embedding/embeddings"], values["position_embedding/embeddings"]])
    for i, decoder in enumerate(decoders):
        block = {name.split("/", 1)[1]: v for name, v in values.items() if name.startswith(f"block_{i}/")}
        kernels = block["query_key_value/kernel"].reshape(-1, 3, heads, width)
        biases = block["query_key_value/bias"].reshape(3, heads, width)
        projections = [part for k in range(3) for part in (kernels[:, k], biases[k])]
        attention_output = [block["attention_output/kernel"].reshape(heads, width, -1), block["attention_output/bias"]]
        rest = ["attention_norm/gamma", "attention_norm/beta", "intermediate/kernel", "intermediate/bias"]
        rest += ["output/kernel", "output/bias", "feedforward_norm/gamma", "feedforward_norm/beta"]
        decoder.set_weights([*projections, *attention_output, *(block[name] for name in rest)])
    dense.set_weights([values["unembedding/kernel"].T, values["unembedding/bias"]])


def spread_out(model, stddev=0.3):
    """Gives every weight, biases and scales too, a random value: zeros and ones would hide mistakes."""
    random = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(variable.numpy() + random.normal(0, stddev, variable.shape))


def random_tokens(vocabulary_size, *shape):
    return np.random.default_rng(1).integers(0, vocabulary_size, shape).astype(np.int32)


def test_defaults_are_the_tutorials_model_parameter_for_parameter():
    assert GPT(ModelConfig(), 5000, 128).count_params() == 3_387_266
    assert tutorial_model(ModelConfig(), 5000, 128).count_params() == 3_387_266


def test_logits_equal_those_of_the_keras_nlp_layers_with_the_same_weights():
    config = ModelConfig()
    model, reference = GPT(config, 200, 32), tutorial_model(config, 200, 32)
    # Little enough that attention does not turn into a choice of one: there float32 itself would not agree to 1e-5.
    spread_out(model, 0.05)
    copy_weights(model, reference)
    tokens = random_tokens(200, 3, 32)
    np.testing.assert_allclose(model(tokens), reference(tokens), atol=1e-5, rtol=1e-5)


def test_loss_is_that_of_the_logits():
    for config in SHAPES:
        model = GPT(config, 20, 8, dtype="float64")
        spread_out(model)
        tokens, targets = random_tokens(20, 2, 8), random_tokens(20, 2, 8)[:, ::-1]
        plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum", dtype="float64")
        expected = plain(targets, model(tokens))
        loss_sum, num_targets = model.training_loss(tokens, targets, np.ones((2, 8)))
        np.testing.assert_allclose(loss_sum, expected, rtol=1e-12)
        assert num_targets == 16


@pytest.mark.parametrize("config", SHAPES)
def test_rows_beyond_the_vocabulary_are_logits_and_weights_like_any_other(config):
    padded = config.model_copy(update={"vocabulary_multiple": 16})
    model, plain = (GPT(shape, size, 8, dtype="float64") for shape, size in ((padded, 20), (config, 32)))
    assert model.vocabulary_size == 20
    assert [v.shape for v in model.variables] == [v.shape for v in plain.variables]
    spread_out(model)
    plain.set_weights(model.get_weights())
    tokens, targets = random_tokens(20, 2, 8), random_tokens(20, 2, 8)[:, ::-1]
    assert model(tokens).shape == (2, 8, 32)
    np.testing.assert_array_equal(model(tokens), plain(tokens))
    for loss in ("training_loss", "evaluation_loss"):
        batch = (tokens, targets, np.ones((2, 8)))
        assert getattr(model, loss)(*batch)[0] == getattr(plain, loss)(*batch)[0]


@pytest.mark.parametrize("config", SHAPES)
def test_cached_logits_equal_the_full_forward_pass_at_every_position(config):
    model = GPT(config, 20, 8)
    spread_out(model)
    tokens = random_tokens(20, 2, 8)
    whole = model(tokens)
    cache = model.empty_cache(2)
    prefix, cache = model.decode(tokens[:, :3], cache, tf.constant(0))
    np.testing.assert_allclose(prefix, whole[:, :3], atol=1e-5)
    for i in range(3, 8):
        one, cache = model.decode(tokens[:, i : i + 1], cache, tf.constant(i))
        np.testing.assert_allclose(one[:, 0], whole[:, i], atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_document_starts_at_its_bos_and_the_first_one_at_the_start_of_the_window(jit_compile):
    starts = tf.function(document_starts, autograph=False, jit_compile=jit_compile)(WINDOWS, BOS).numpy()
    expected = np.zeros_like(WINDOWS)
    for row, begin, end in DOCUMENTS:
        expected[row, begin:end] = begin
    np.testing.assert_array_equal(starts, expected)
    assert starts.dtype == np.int32


@pytest.mark.parametrize("config", MASKED_SHAPES)
def test_packed_documents_have_the_logits_of_each_alone(config):
    model = GPT(config, 20, 12, dtype="float64", bos_id=BOS)
    plain = GPT(config.model_copy(update={"document_mask": False}), 20, 12, dtype="float64")
    spread_out(model)
    plain.set_weights(model.get_weights())
    packed, mixed = model(WINDOWS), plain(WINDOWS)
    for row, begin, end in DOCUMENTS:
        alone = plain(WINDOWS[row : row + 1, begin:end])[0]
        np.testing.assert_allclose(packed[row, begin:end], alone, atol=1e-12)
        # Without the mask only the first document of a window does not see others.
        assert np.allclose(mixed[row, begin:end], alone, atol=1e-3) == (begin == 0)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_loss_of_a_document_has_no_gradient_in_another_s_tokens(jit_compile):
    model = GPT(MASKED_SHAPES[0], 20, 12, dtype="float64", bos_id=BOS)
    spread_out(model)
    tables = [layer.embeddings.value for layer in (model.token_embedding, model.position_embedding)]

    @tf.function(autograph=False, jit_compile=jit_compile)
    def gradients(weights):
        with tf.GradientTape() as tape:
            loss_sum, _ = model.training_loss(WINDOWS, np.roll(WINDOWS, -1, axis=1), weights)
        return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss_sum, tables)]

    for row, begin, end in DOCUMENTS:
        weights = np.zeros(WINDOWS.shape)
        weights[row, begin:end] = 1
        own_tokens, own_positions = set(WINDOWS[row, begin:end]), set(range(end - begin))
        for gradient, own in zip(gradients(tf.constant(weights)), (own_tokens, own_positions), strict=True):
            assert set(np.flatnonzero(np.any(gradient != 0, axis=1))) == own


@pytest.mark.parametrize("config", MASKED_SHAPES)
def test_cached_logits_of_a_document_equal_those_with_the_mask(config):
    model = GPT(config, 20, 12, dtype="float64", bos_id=BOS)
    spread_out(model)
    tokens = WINDOWS[1:, :5]
    # It is packed behind another document, so in the window its positions differ from the positions of decoding.
    whole = model(np.concatenate([WINDOWS[:1, :7], tokens], axis=1))[:, 7:]
    prefix, cache = model.decode(tokens[:, :2], model.empty_cache(1), tf.constant(0))
    np.testing.assert_allclose(prefix, whole[:, :2], atol=1e-12)
    for i in range(2, 5):
        one, cache = model.decode(tokens[:, i : i + 1], cache, tf.constant(i))
        np.testing.assert_allclose(one[:, 0], whole[:, i], atol=1e-12)


def test_without_the_mask_the_program_does_not_search_for_documents():
    def operations(config):
        model = GPT(config, 20, 12, bos_id=BOS)
        graph = tf.function(model.hidden_states, autograph=False).get_concrete_function(WINDOWS).graph
        return {operation.type for operation in graph.get_operations()}

    searching = {"Equal", "Cumsum", "LowerBound"}
    assert searching <= operations(MASKED_SHAPES[0])
    assert not searching & operations(SHAPES[0])


def test_a_document_mask_needs_bos_id():
    with pytest.raises(ValueError, match=r"model.document_mask=true finds documents by their \[BOS\]; give bos_id"):
        GPT(MASKED_SHAPES[0], 20, 12)


def test_keras_summary_names_the_parts():
    lines = []
    GPT(SHAPES[0], 20, 8).summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert all(name in text for name in ("token_embedding", "block_0", "block_1", "unembedding"))


def test_dropout_in_keras_fit_is_refused_rather_than_left_out():
    model = GPT(ModelConfig(hidden_dim=16, dropout=0.1), 20, 8)
    model(random_tokens(20, 1, 8))
    with pytest.raises(ValueError, match=r"model.dropout=0.1 needs trainer.train"):
        model(random_tokens(20, 1, 8), training=True)


def plain_logits(model, tokens, starts):
    """The GPT by the formulas of its papers, a step at a time and with nothing fused."""
    config, weights = model.config, {variable.path.removeprefix("gpt/"): variable.value for variable in model.variables}
    heads, width = config.num_heads, config.head_width()
    key_heads = config.num_key_value_heads or heads
    positions = np.arange(tokens.shape[1])
    allowed = (positions <= positions[:, np.newaxis]) & (positions >= starts[..., np.newaxis])
    positions = positions - starts

    def dense(x, name):
        return tf.einsum("...i,io->...o", x, weights[f"{name}/kernel"]) + weights.get(f"{name}/bias", 0.0)

    def norm(x, name):
        if config.norm == "layer":
            x -= tf.reduce_mean(x, axis=-1, keepdims=True)
        x /= tf.sqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)
        return x * weights[f"{name}/gamma"] + weights.get(f"{name}/beta", 0.0)

    def unit(x, name):
        if not config.qk_norm:
            return x
        x /= tf.sqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)
        return x * weights[f"{name}/gamma"]

    def turned(x):
        pairs = x.shape[-1] // 2
        angles = positions[..., np.newaxis] * config.rope_theta ** (-np.arange(pairs) / pairs)
        z = tf.complex(x[..., :pairs], x[..., pairs:]) * tf.complex(np.cos(angles), np.sin(angles))
        return tf.concat([tf.math.real(z), tf.math.imag(z)], axis=-1)

    def attention(x, block):
        columns = [heads * width, key_heads * width, key_heads * width]
        query, key, value = (
            [part[..., i : i + width] for i in range(0, part.shape[-1], width)]
            for part in tf.split(dense(x, f"{block}/query_key_value"), columns, axis=-1)
        )
        outs = []
        for h in range(heads):
            q, k, v = query[h], key[h * key_heads // heads], value[h * key_heads // heads]
            q, k = unit(q, f"{block}/query_norm"), unit(k, f"{block}/key_norm")
            if config.positions == "rope":
                q, k = turned(q), turned(k)
            scores = tf.einsum("btd,bsd->bts", q, k) / width**0.5
            exponentials = tf.exp(scores) * allowed
            outs.append(exponentials / tf.reduce_sum(exponentials, axis=-1, keepdims=True) @ v)
        return dense(tf.concat(outs, axis=-1), f"{block}/attention_output")

    def feedforward(x, block):
        x = dense(x, f"{block}/intermediate")
        if config.activation == "swiglu":
            gate, x = x[..., : config.intermediate_dim], x[..., config.intermediate_dim :]
            x = gate / (1 + tf.exp(-gate)) * x
        elif config.activation == "gelu_tanh":
            x *= 0.5 * (1 + tf.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
        else:
            x *= tf.cast(x > 0, x.dtype)
        return dense(x, f"{block}/output")

    x = tf.gather(weights["token_embedding/embeddings"], tokens)
    if config.positions == "learned":
        x += tf.gather(weights["position_embedding/embeddings"], positions)
    for i in range(config.num_layers):
        for part, name in ((attention, "attention_norm"), (feedforward, "feedforward_norm")):
            if config.pre_norm:
                x += part(norm(x, f"block_{i}/{name}"), f"block_{i}")
            else:
                x = norm(x + part(x, f"block_{i}"), f"block_{i}/{name}")
    x = norm(x, "final_norm") if config.pre_norm else x
    return tf.einsum("btd,vd->btv", x, weights["unembedding/kernel"]) + weights.get("unembedding/bias", 0.0)


@pytest.mark.parametrize("document_mask", [False, True])
def test_loss_and_gradients_of_all_modern_settings_are_those_of_the_formulas(document_mask):
    starts = np.zeros_like(WINDOWS)
    for row, begin, end in DOCUMENTS if document_mask else ():
        starts[row, begin:end] = begin
    targets, weights = np.roll(WINDOWS, -1, axis=1), np.random.default_rng(3).integers(0, 2, WINDOWS.shape)
    for config in MODERN_SHAPES:
        config = config.model_copy(update={"document_mask": document_mask})
        model = GPT(config, 20, 12, dtype="float64", bos_id=BOS)
        spread_out(model)
        variables = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape() as tape:
            logits = plain_logits(model, WINDOWS, starts)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
            loss = tf.reduce_sum(losses * weights)
            objective = loss + 0.1 * tf.reduce_sum(tf.reduce_logsumexp(logits, axis=-1) ** 2 * weights)
        expected = tape.gradient(objective, variables)
        with tf.GradientTape() as tape:
            loss_sum, _ = model.training_loss(WINDOWS, targets, weights, z_loss=0.1)
        gradients = tape.gradient(loss_sum, variables)
        np.testing.assert_allclose(loss_sum, loss, rtol=1e-12)
        np.testing.assert_allclose(model(WINDOWS), logits, atol=1e-11)
        for ours, theirs in zip(gradients, expected, strict=True):
            # An embedding's come as slices.
            ours, theirs = (tf.convert_to_tensor(gradient) for gradient in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


def test_cached_logits_equal_the_full_forward_pass_with_all_modern_settings():
    tokens = random_tokens(20, 2, 6)
    for config in MODERN_SHAPES:
        model = GPT(config, 20, 8, dtype="float64")
        spread_out(model)
        whole, cache = model(tokens), model.empty_cache(2)
        shapes = [kept.shape for of_block in cache for kept in of_block]
        assert shapes == 2 * config.num_layers * [(2, config.num_key_value_heads or config.num_heads, 8, 4)]
        for first, end in ((0, 3), (3, 4), (4, 6)):
            some, cache = model.decode(tokens[:, first:end], cache, tf.constant(first))
            np.testing.assert_allclose(some, whole[:, first:end], atol=1e-12)


def test_turned_positions_have_no_table_and_no_end():
    config = ModelConfig(num_heads=2, hidden_dim=16, intermediate_dim=12, positions="rope")
    model = GPT(config, 20, 4, dtype="float64")
    assert not any("position" in variable.path for variable in model.variables)
    spread_out(model)
    longer = GPT(config, 20, 12, dtype="float64")
    longer.set_weights(model.get_weights())
    np.testing.assert_array_equal(model(random_tokens(20, 2, 12)), longer(random_tokens(20, 2, 12)))


def test_the_tutorials_model_starts_from_the_spread_of_the_tutorials_weights():
    config = ModelConfig()
    model, reference = GPT(config, 1000, 128), tutorial_model(config, 1000, 128)
    other = tutorial_model(config, 1000, 128)
    initial = [np.array(weight) for weight in reference.get_weights()]
    copy_weights(model, other)
    for ours, theirs in zip(other.get_weights(), initial, strict=True):
        np.testing.assert_allclose(np.std(ours), np.std(theirs), rtol=0.03)
        np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.03)
