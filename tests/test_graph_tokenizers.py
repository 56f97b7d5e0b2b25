"""The tokenizers as TensorFlow operations give the tokens and texts of the tokenizers."""

import random

import pytest
import tensorflow as tf
from random_run import PROMPTS, TEXT  # type: ignore[import-not-found]
from tokenizers import Tokenizer, models, pre_tokenizers

from trainer.config.settings import BpeConfig, ByteConfig, CharConfig, TokenizerConfig, WordPieceConfig
from trainer.exchange.graph_tokenizers import in_graph
from trainer.tokenizers.bpe import BpeTokenizer
from trainer.tokenizers.tokenizer_files import train_tokenizer
from trainer.tokenizers.vocabulary import BYTE_SPECIAL_TOKENS

CONFIGS: tuple[TokenizerConfig, ...] = (
    ByteConfig(kind="byte"),
    CharConfig(kind="char"),
    BpeConfig(kind="bpe", vocabulary_size=400),
    WordPieceConfig(kind="wordpiece", vocabulary_size=400),
    WordPieceConfig(kind="wordpiece", vocabulary_size=400, lowercase=False),
)
# Blanks of all kinds, contractions, and characters at the edges of a tokenizer's rules.
PIECES = [
    "'s",
    "'ll",
    "'re",
    " '",
    "''",
    "'",
    "s",
    "ve",
    "A",
    " ",
    "\n",
    "\t",
    "\u00a0",
    "\u3000",
    "1",
    "९",
    "Ⅷ",
    "६",
    ".",
]
PIECES += ["é", "안", "\u110f", "\u1161", "\u11ab", "ㅋ", "🙂", "\u0301", "\x00", "\u200b", "我", "ß", "\U0010ffff"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-{getattr(config, 'lowercase', '')}")
def test_tokens_and_texts_are_those_of_the_tokenizer(config: TokenizerConfig):
    tokenizer = train_tokenizer(config, TEXT.splitlines())
    graph = in_graph(tokenizer)
    choose = random.Random(0)
    fuzz = ["".join(choose.choices(PIECES, k=choose.randrange(12))) for _ in range(2000)]
    texts = [*PROMPTS, *TEXT.splitlines(), *fuzz]
    encoded = [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]
    encode = tf.function(graph.encode, [tf.TensorSpec([None], tf.string)], autograph=False)
    assert encode(tf.constant(texts)).to_list() == encoded
    assert encode(tf.constant([], tf.string)).to_list() == []
    encoded += [[choose.randrange(tokenizer.vocabulary_size) for _ in range(choose.randrange(12))] for _ in range(1000)]
    decode = tf.function(graph.decode, [tf.RaggedTensorSpec([None, None], tf.int32)], autograph=False)
    decoded = decode(tf.ragged.constant(encoded, tf.int32, ragged_rank=1)).numpy()
    assert [text.decode() for text in decoded] == [tokenizer.decode(tokens) for tokens in encoded]


def test_merges_come_in_the_order_of_their_ranks_and_from_the_left():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "c"), ("a", "a"), ("a", "bc"), ("aa", "aa"), ("aa", "a")]  # Here a merge can come before its parts.
    tokens = [*BYTE_SPECIAL_TOKENS, *letters, *("".join(pair) for pair in merges)]
    twin = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = BpeTokenizer(twin.to_str())
    texts = ["a" * n + end for n in range(12) for end in ("", "b", "bc", "bcbc")]
    assert in_graph(tokenizer).encode(tf.constant(texts)).to_list() == [
        tokenizer.encode(each).tolist() for each in texts
    ]
