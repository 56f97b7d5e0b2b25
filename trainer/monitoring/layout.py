"""The charts of the tab Custom Scalars: what belongs together, side by side."""

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.util.tensor_util import make_tensor_proto

from trainer.config.settings import Config
from trainer.monitoring import tags

# By category and title: the tags of a chart, as regular expressions.
CHARTS = {
    "loss": {
        "loss, nats per token": [f"{tags.LOSS}$"],
        "perplexity": [f"{tags.PERPLEXITY}$"],
        "bits per byte": [f"{tags.bits_per_byte(is_lossy=False)}(_lossy)?$"],
    },
    "speed": {
        "tokens per second": [f"{tags.TOKENS_PER_SEC_IN_STEPS}$", f"{tags.TOKENS_PER_SEC_OVERALL}$"],
        "share of time spent waiting for batches": [f"{tags.INPUT_SHARE}$"],
    },
    "optimizer": {
        "learning rate": [f"{tags.LEARNING_RATE}$"],
        "norm of the gradients": [f"{tags.GRAD_NORM}$"],
        "share of clipped steps": [f"{tags.CLIP_RATE}$"],
        "skipped steps": [f"{tags.SKIPPED_STEPS}$"],
    },
}

# Charts of runs with evaluation.sets or data.weights only. Otherwise they would be empty.
CHARTS_OF_SEVERAL_TEXTS = {
    "texts": {
        "loss of each text, nats per token": [f"{tags.LOSS}(/|_of_source_)"],
        "bits per byte of each text": [f"{tags.bits_per_byte(is_lossy=False)}(_lossy)?/"],
    }
}


def layout_summary(config: Config) -> Summary:
    """Returns the charts of a run as TensorBoard reads them; it joins those of all runs that it shows."""
    layout = layout_pb2.Layout()
    has_several = config.evaluation.sets or config.data.weights is not None
    is_averaged = config.optimizer.ema_decay is not None
    for title, charts in (CHARTS | (CHARTS_OF_SEVERAL_TEXTS if has_several else {})).items():
        category = layout.category.add(title=title)
        for name, patterns in charts.items():
            chart = category.chart.add(title=name).multiline
            chart.tag.extend(f"^{pattern}" for pattern in patterns)
            if is_averaged and f"{tags.LOSS}$" in patterns:
                chart.tag.append(f"^{tags.RAW_LOSS}$")
    summary = Summary()
    summary.value.add(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=metadata.create_summary_metadata(),
        tensor=make_tensor_proto(layout.SerializeToString()),
    )
    return summary
