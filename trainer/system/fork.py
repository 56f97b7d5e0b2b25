"""Detects that this process was forked from one that had used TensorFlow: in such a process TensorFlow hangs.

The package imports this module, so it imports next to nothing.
"""

import os
import sys

from trainer.errors import UserError

# Whether TensorFlow had threads when this process last forked, and when this process was forked.
_runs_tensorflow = False
_was_forked_from_tensorflow = False


def check_not_forked() -> None:
    """Raises UserError in a process that was forked from one that had used TensorFlow: a fork has none of its threads,
    and the first operation waits for them for ever.
    """
    if _was_forked_from_tensorflow:
        raise UserError(
            "This process was forked from one that had used TensorFlow, and TensorFlow would hang here. Start a new "
            "process instead, with multiprocessing.get_context('spawn'), or fork before TensorFlow is used."
        )


def _before_fork() -> None:
    global _runs_tensorflow
    module = sys.modules.get("tensorflow.python.eager.context")
    # TensorFlow makes the handle and its threads at the first operation.
    _runs_tensorflow = module is not None and getattr(module.context_safe(), "_context_handle", None) is not None


def _after_fork_in_child() -> None:
    global _was_forked_from_tensorflow
    _was_forked_from_tensorflow = _runs_tensorflow


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
