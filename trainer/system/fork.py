"""Tells whether this process was forked from one that had used TensorFlow, which hangs in it.

The package imports this module, so it imports next to nothing.
"""

import os
import sys

from trainer.errors import UserError

# Whether TensorFlow had threads at the last fork that this process made, and at the one that made it.
_runs_tensorflow = False
_was_forked_from_tensorflow = False


def check_not_forked() -> None:
    """Raises UserError in a process forked from one that had used TensorFlow: its threads are not there any more, and
    the first operation waits for them for ever.
    """
    if _was_forked_from_tensorflow:
        raise UserError(
            "This process was forked from one that had used TensorFlow, which hangs in it. Start it anew instead: with "
            "multiprocessing.get_context('spawn'), or before TensorFlow is used."
        )


def _before_fork() -> None:
    global _runs_tensorflow
    module = sys.modules.get("tensorflow.python.eager.context")
    # The handle is made with the first operation, and the threads with it.
    _runs_tensorflow = module is not None and getattr(module.context_safe(), "_context_handle", None) is not None


def _after_fork_in_child() -> None:
    global _was_forked_from_tensorflow
    _was_forked_from_tensorflow = _runs_tensorflow


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
