"""The names of a run's curves and texts, in the one place that writers and readers take them from.

TensorBoard makes a group of the tags whose first part is the same. Training and validation write the same tags into two
folders, so a metric of both is one chart.
"""

LOSS = "loss/nats_per_token"
RAW_LOSS = "loss/nats_per_token_raw"
PERPLEXITY = "loss/perplexity"
EXCESS = "loss/excess_nats_per_token"
TOKENS_PER_SEC_IN_STEPS = "speed/tokens_per_sec_in_steps"
TOKENS_PER_SEC_OVERALL = "speed/tokens_per_sec_overall"
MEAN_TOKENS_PER_SEC = "speed/mean_tokens_per_sec_in_steps"
MFU_IN_STEPS = "speed/mfu_in_steps"
MFU_OVERALL = "speed/mfu_overall"
LEARNING_RATE = "optimizer/learning_rate"
GRAD_NORM = "optimizer/grad_norm"
CLIP_RATE = "optimizer/clip_rate"
LOSS_SCALE = "optimizer/loss_scale"
SKIPPED_STEPS = "health/skipped_steps"
INPUT_SHARE = "health/input_share"
EPOCH = "progress/epoch"
CONFIG = "text/config"
HISTORY = "text/history"


def bits_per_byte(is_lossy: bool) -> str:
    """Returns the tag of bits per byte: another one if the bits are about less than the text."""
    return "loss/bits_per_byte_lossy" if is_lossy else "loss/bits_per_byte"


def of_set(tag: str, name: str) -> str:
    """Returns the tag of a figure of one of evaluation.sets."""
    return f"{tag}/{name}"


def loss_of_source(number: int) -> str:
    """Returns the tag of the validation loss of a source that data.weights mixes."""
    return f"{LOSS}_of_source_{number}"


def weights_of(variable: str) -> str:
    """Returns the tag of the histograms of a variable's weights."""
    return f"weights/{variable}"


def gradients_of(variable: str) -> str:
    """Returns the tag of the histograms of a variable's gradients."""
    return f"weight_gradients/{variable}"  # After the curves, in the order of the alphabet.


def samples_of(decoder: str) -> str:
    """Returns the tag of the samples that a decoder writes."""
    return f"text/samples/{decoder}"


def current(tag: str) -> str:
    """Returns the tag of today for one of version 0.1.0, which had no groups; a tag of today stays as it is."""
    name, slash, rest = tag.partition("/")
    if name == "loss" and slash:
        return tag if tag.startswith(_OF_LOSS) else of_set(LOSS, rest)  # Then `rest` is one of evaluation.sets.
    if name.startswith("loss_of_source_"):
        return LOSS + name.removeprefix("loss")
    return _RENAMED.get(name, name) + slash + rest


_OF_LOSS = (LOSS, PERPLEXITY, EXCESS, bits_per_byte(is_lossy=False))  # As the beginnings of tags.

_RENAMED = {"loss": LOSS} | {
    tag.partition("/")[2]: tag
    for tag in (
        PERPLEXITY,
        bits_per_byte(is_lossy=False),
        bits_per_byte(is_lossy=True),
        EXCESS,
        TOKENS_PER_SEC_IN_STEPS,
        TOKENS_PER_SEC_OVERALL,
        MFU_IN_STEPS,
        MFU_OVERALL,
        LEARNING_RATE,
        GRAD_NORM,
        CLIP_RATE,
        SKIPPED_STEPS,
        INPUT_SHARE,
        EPOCH,
    )
}
