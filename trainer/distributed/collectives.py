"""How replicas exchange pieces of tensors. Only this module has ranks, ordering tokens, keys and hints.

                on CPUs                       on GPUs (NCCL)               in a program of XLA, as on TPUs
gather          CollectiveGatherV2            CollectiveGatherV2           stablehlo.all_gather
reduce_scatter  CollectiveAllToAllV2, a sum;  CollectiveReduceScatterV2    stablehlo.reduce_scatter
                from 12 replicas on
                CollectiveReduceV2, a slice
all_reduce      CollectiveReduceV2            CollectiveReduceV2           stablehlo.all_reduce
all_to_all      CollectiveAllToAllV2;         CollectiveAllToAllV2         stablehlo.all_to_all
                from 12 replicas on
                CollectiveGatherV2, a slice

Why these:
- CPUs have no kernel for CollectiveReduceScatterV2. Each replica sends the others their rows and adds up its own, in
  the order of the ranks, so the same bits come out every time.
- TensorFlow's all-to-all on CPUs names a message by its sender and receiver without a separator: with 12 replicas, 1 to
  10 and 11 to 0 have the same name.
- CollectiveGatherV2 does not take bfloat16, and TensorFlow's NcclManager in no operation; its bits travel as float16.
- XLA has no kernels for these operations, and `XlaAllReduce` and `XlaReduceScatter` refuse float64. `XlaCallModule`
  holds one StableHLO operation of any dtype. XLA turns reduce_scatter of a vector into an all-reduce of twice the
  traffic, so vectors are joined to one matrix [pieces, numbers]. For TPUs it does the same with a matrix that it has
  laid out by columns, so reduce_scatter gets [pieces, rows, columns], whose first axis stays the outermost.
- Operations in a replica function are chained in the order of the program over all replicas of a process, so that
  replica 0's would wait for replica 1's, which wait for replica 0. An ordering token, a variable that each replica has
  for itself, chains only one replica's operations.
- A piece's place is the rank, which the operations' results are ordered by: the order of the names of tasks and devices
  as texts. With 11 workers, worker 10 comes after worker 1. So it is learned once, by gathering the
  replicas' numbers in each group.
- No operation has a timeout: for each one that has, TensorFlow keeps a thread asleep as long as the timeout, though the
  operation is over, so that a run would have thousands. A lost worker ends the others' operations by TensorFlow's own
  checks of workers, as in a run without pieces.

All replicas must call the same functions of a Collectives in the same order while they trace: a count of the calls
tells their operations apart.
"""

import abc
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tensorflow as tf
from tensorflow.compiler.mlir.stablehlo import stablehlo
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from trainer.distributed.strategy import device_kind
from trainer.optimizers.variables import per_replica

# Who takes part in an operation: all replicas, those of a group, or those that have the same place in their groups.
Among = Literal["all", "group", "place"]

# From this many replicas on CollectiveAllToAllV2 fails on CPUs; see above.
_ALL_TO_ALL_BELOW = 12
# Larger than the keys that tf.distribute counts up from.
_group_keys = itertools.count(7_000)


class Collectives(abc.ABC):
    """What replicas exchange, as one of them sees it. Call it in a replica function, except `places_of_this_process`.

    The replicas form groups of neighbours, usually a single one. The replicas of a group together hold all pieces.
    Gathers stay within a group; sums are over all replicas.

    Attributes:
        num_pieces: the replicas of a group.
        num_groups: the groups.
        is_one_program: whether XLA compiles the operations with all of the step.
    """

    num_pieces: int
    num_groups: int = 1
    is_one_program = False

    def place(self) -> int | tf.Tensor:
        """Returns which piece is this replica's, from 0 on: a number, or an int32 scalar."""
        return self._place()

    def gather(self, pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns all pieces one below the other. For each input [rows, ...] returns
        [num_pieces * rows, ...].
        """
        return _by_dtype(self._gather, pieces)

    def reduce_scatter(self, summands: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns this replica's piece of sums over all replicas. For each input [num_pieces * rows, ...] returns
        [rows, ...].
        """
        return _by_dtype(self._reduce_scatter, summands)

    def all_reduce(self, summand: tf.Tensor) -> tf.Tensor:
        """Returns the sum of a vector over all replicas, equal on all."""
        return self._all_reduce(summand)

    def all_to_all(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Gives part i of each tensor [num_pieces, ...] to the group's replica of place i. Returns tensors like these,
        of which part i is what the replica of place i gave.
        """
        return _by_dtype(self._all_to_all, tensors)

    def of_first(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the tensors of the first replica of all, on every replica.

        Args:
            tensors: numbers that float32 holds, of the same shapes on all replicas and in all calls.
        """
        flat = tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], axis=0)
        is_first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0)
        # In a sum with zeros every number stays what it is, infinite or not.
        total = self.all_reduce(tf.where(is_first, flat, tf.zeros_like(flat)))
        parts = tf.split(total, [tf.size(tensor) for tensor in tensors], num=len(tensors))
        return [
            tf.ensure_shape(tf.cast(tf.reshape(part, tf.shape(tensor)), tensor.dtype), tensor.shape)
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def after(self, first: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns copies of tensors that are computed only after `first`; what reads a copy waits for `first`."""
        return self._after(first, tensors)

    def own(self, whole: tf.Tensor) -> tf.Tensor:
        """Returns this replica's piece of a tensor [num_pieces * rows, ...] that all replicas have."""
        return tf.gather(tf.reshape(whole, [self.num_pieces, -1, *whole.shape[1:]]), self.place())

    def places_of_this_process(self, strategy: tf.distribute.Strategy) -> list[int]:
        """Returns the places of this process's replicas, in the order of `experimental_local_results`."""

        @tf.function(autograph=False)
        def places() -> tf.Tensor:
            return strategy.run(lambda: tf.identity(tf.convert_to_tensor(self.place(), tf.int32)))

        return [int(each) for each in strategy.experimental_local_results(places())]

    def _after(self, first: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        with tf.control_dependencies([first]):
            return [tf.identity(tensor) for tensor in tensors]

    @abc.abstractmethod
    def _place(self) -> int | tf.Tensor: ...

    @abc.abstractmethod
    def _gather(self, pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]: ...

    @abc.abstractmethod
    def _reduce_scatter(self, summands: Sequence[tf.Tensor]) -> list[tf.Tensor]: ...

    @abc.abstractmethod
    def _all_reduce(self, summand: tf.Tensor) -> tf.Tensor: ...

    @abc.abstractmethod
    def _all_to_all(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]: ...


class TensorFlowCollectives(Collectives):
    """TensorFlow's own operations, for CPUs and GPUs of one process or several.

    Every worker makes it at the same time: it gathers the replicas' numbers, to learn the place of each.

    Args:
        strategy: the run's strategy, of several replicas.
        num_pieces: the replicas of a group; divides their number.
    """

    def __init__(self, strategy: tf.distribute.Strategy, num_pieces: int) -> None:
        self.num_pieces, self.num_groups = num_pieces, strategy.num_replicas_in_sync // num_pieces
        self._is_gpu = device_kind(strategy) == "GPU"
        # The keys of those who exchange: all replicas, those of a group, and those that have the same place.
        self._key_of_all = next(_group_keys)
        self._keys_of_groups = [next(_group_keys) for _ in range(self.num_groups)]
        self._keys_of_places = [next(_group_keys) for _ in range(num_pieces)]
        self._num_calls: dict[int, int] = {}
        with strategy.scope():
            self._token = per_replica([], tf.float32, "ordering_token")

        def number() -> tf.Tensor:
            return tf.raw_ops.CollectiveGatherV2(input=tf.constant([_number()], tf.int32), **self._how("group"))

        @tf.function(autograph=False)
        def numbers() -> tf.Tensor:
            return strategy.run(number)

        # In each group by itself: TensorFlow ranks the members of every group anew, on GPUs along their links.
        orders = [each.numpy().tolist() for each in strategy.experimental_local_results(numbers())]
        self._place_of = {number: place for order in orders for place, number in enumerate(order)}

    def _group(self, number: int) -> int:
        return number // self.num_pieces

    def _place(self) -> int:
        return self._place_of[_number()]

    def _gather(self, pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        flat = tf.concat([tf.reshape(piece, [1, -1]) for piece in pieces], axis=1)
        is_bfloat16 = flat.dtype == tf.bfloat16
        travels = tf.bitcast(flat, tf.float16) if is_bfloat16 else flat
        joined = tf.raw_ops.CollectiveGatherV2(input=travels, **self._how("group"))
        joined = tf.ensure_shape(joined, [self.num_pieces, flat.shape[1]])
        joined = tf.bitcast(joined, tf.bfloat16) if is_bfloat16 else joined
        parts = tf.split(joined, [math.prod(piece.shape) for piece in pieces], axis=1)
        return [
            tf.reshape(part, [self.num_pieces * piece.shape[0], *piece.shape[1:]])
            for part, piece in zip(parts, pieces, strict=True)
        ]

    def _reduce_scatter(self, summands: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        parts = [tf.reshape(summand, [self.num_pieces, -1]) for summand in summands]
        flat = tf.concat(parts, axis=1)
        if self._is_gpu:
            own = tf.raw_ops.CollectiveReduceScatterV2(input=flat, merge_op="Add", final_op="Id", **self._how("group"))
        elif self.num_pieces < _ALL_TO_ALL_BELOW:
            own = tf.reduce_sum(tf.raw_ops.CollectiveAllToAllV2(input=flat, **self._how("group")), axis=0)
        else:
            own = self.own(self._reduced(flat, "group"))
        own = tf.ensure_shape(tf.reshape(own, [-1]), [flat.shape[1]])
        if self.num_groups > 1:
            own = self._reduced(own, "place")
        pieces = tf.split(own, [part.shape[1] for part in parts])
        return [
            tf.reshape(piece, [summand.shape[0] // self.num_pieces, *summand.shape[1:]])
            for piece, summand in zip(pieces, summands, strict=True)
        ]

    def _all_reduce(self, summand: tf.Tensor) -> tf.Tensor:
        return self._reduced(summand, "all")

    def _reduced(self, summand: tf.Tensor, among: Among) -> tf.Tensor:
        total = tf.raw_ops.CollectiveReduceV2(input=summand, merge_op="Add", final_op="Id", **self._how(among))
        return tf.ensure_shape(total, summand.shape)

    def _all_to_all(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        parts = [tf.reshape(tensor, [self.num_pieces, -1]) for tensor in tensors]
        flat = tf.concat(parts, axis=1)
        if self._is_gpu or self.num_pieces < _ALL_TO_ALL_BELOW:
            is_bfloat16 = flat.dtype == tf.bfloat16
            travels = tf.bitcast(flat, tf.float16) if is_bfloat16 else flat
            received = tf.raw_ops.CollectiveAllToAllV2(input=travels, **self._how("group"))
            received = tf.bitcast(received, tf.bfloat16) if is_bfloat16 else received
        else:
            of_all = tf.reshape(self._gather([flat])[0], [self.num_pieces, *flat.shape])
            received = tf.gather(of_all, self.place(), axis=1)
        own = tf.split(tf.ensure_shape(received, flat.shape), [part.shape[1] for part in parts], axis=1)
        return [tf.reshape(part, tensor.shape) for part, tensor in zip(own, tensors, strict=True)]

    def _how(self, among: Among) -> dict[str, Any]:
        """Returns the arguments of an operation among all replicas, those of a group, or those of the same place."""
        number = _number()
        if among == "all" or self.num_groups == 1:
            size, key = self.num_pieces * self.num_groups, self._key_of_all
        elif among == "group":
            size, key = self.num_pieces, self._keys_of_groups[self._group(number)]
        else:
            size, key = self.num_groups, self._keys_of_places[self._place()]
        self._num_calls[number] = self._num_calls.get(number, 0) + 1
        return {
            "group_size": size,
            "group_key": key,
            "instance_key": self._num_calls[number],
            "ordering_token": [self._token.handle],
            "communication_hint": "nccl" if self._is_gpu else "auto",
        }


class XlaCollectives(Collectives):
    """Operations of one program that XLA compiles as a whole for several replicas.

    Args:
        num_replicas: the replicas that run the program.
        num_pieces: the replicas of a group; divides their number.
    """

    is_one_program = True

    def __init__(self, num_replicas: int, num_pieces: int) -> None:
        self.num_pieces, self.num_groups = num_pieces, num_replicas // num_pieces

    def _after(self, first: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return _after_in_xla(first, tensors)

    def _place(self) -> tf.Tensor:
        # Not the number that tf.distribute gives a replica: on a TPU the two need not agree.
        number = gen_xla_ops.xla_replica_id()
        return number if self.num_groups == 1 else number % self.num_pieces

    def _gather(self, pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return self._joining_vectors(self._gather_one, pieces, lambda piece: piece[tf.newaxis])

    def _gather_one(self, piece: tf.Tensor) -> tf.Tensor:
        shape = [self.num_pieces * piece.shape[0], *piece.shape[1:]]
        return self._call("all_gather", piece, shape, "all_gather_dim = 0 : i64, ")

    def _reduce_scatter(self, summands: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        pieces = self._joining_vectors(
            self._scatter_one, summands, lambda summand: tf.reshape(summand, [self.num_pieces, -1])
        )
        return pieces if self.num_groups == 1 else [self._reduced(piece, "place") for piece in pieces]

    def _scatter_one(self, summand: tf.Tensor) -> tf.Tensor:
        shape = [summand.shape[0] // self.num_pieces, *summand.shape[1:]]
        pieces = tf.reshape(summand, [self.num_pieces, *shape])
        piece = self._call("reduce_scatter", pieces, [1, *shape], "scatter_dimension = 0 : i64, ", adds=True)
        return tf.reshape(piece, shape)

    def _all_reduce(self, summand: tf.Tensor) -> tf.Tensor:
        return self._reduced(summand, "all")

    def _reduced(self, summand: tf.Tensor, among: Among) -> tf.Tensor:
        return self._call("all_reduce", summand, summand.shape.as_list(), adds=True, among=among)

    def _all_to_all(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        how = f"split_dimension = 0 : i64, concat_dimension = 0 : i64, split_count = {self.num_pieces} : i64, "
        return [self._call("all_to_all", tensor, tensor.shape.as_list(), how) for tensor in tensors]

    def _joining_vectors(
        self,
        run: Callable[[tf.Tensor], tf.Tensor],
        tensors: Sequence[tf.Tensor],
        matrix_of: Callable[[tf.Tensor], tf.Tensor],
    ) -> list[tf.Tensor]:
        """Returns run of each tensor. All vectors are side by side in one matrix for it."""
        vectors = [matrix_of(each) for each in tensors if each.shape.rank == 1]
        joined = tf.split(run(tf.concat(vectors, 1)), [each.shape[1] for each in vectors], 1) if vectors else []
        flat = iter([tf.reshape(each, [-1]) for each in joined])
        return [next(flat) if each.shape.rank == 1 else run(each) for each in tensors]

    def _call(
        self,
        name: str,
        operand: tf.Tensor,
        shape: Sequence[int],
        how: str = "",
        adds: bool = False,
        among: Among = "group",
    ) -> tf.Tensor:
        """Returns what a collective operation of StableHLO makes of a tensor."""
        before, after = _type_of(operand.shape, operand.dtype), _type_of(shape, operand.dtype)
        number = _type_of([], operand.dtype)
        region = f"""({{
              ^bb0(%one: {number}, %other: {number}):
                %sum = stablehlo.add %one, %other : {number}
                stablehlo.return %sum : {number}
            }}) """
        num_replicas = self.num_pieces * self.num_groups
        numbers = [[*range(first, first + self.num_pieces)] for first in range(0, num_replicas, self.num_pieces)]
        if among == "all":
            numbers = [[*range(num_replicas)]]
        elif among == "place":
            numbers = [list(each) for each in zip(*numbers, strict=True)]
        groups = f"dense<{numbers}> : tensor<{len(numbers)}x{len(numbers[0])}xi64>"
        text = f"""
        module @{name} attributes {{mhlo.num_partitions = 1 : i32, mhlo.num_replicas = {num_replicas} : i32}} {{
          func.func public @main(%operand: {before}) -> {after} {{
            %result = "stablehlo.{name}"(%operand) {region if adds else ""}{{{how}replica_groups = {groups}}} :
                ({before}) -> {after}
            return %result : {after}
          }}
        }}"""
        (result,) = gen_xla_ops.xla_call_module(
            [operand],
            version=9,
            module=stablehlo.serialize_portable_artifact_str(text, stablehlo.get_minimum_version()),
            Sout=[list(shape)],
            Tout=[operand.dtype],
            # The operation wants one platform. The program is the same for all, and a TPU's is lowered on CPUs too.
            platforms=["CPU"],
            disabled_checks=["platform"],
            dim_args_spec=[],
            function_list=[],
            has_token_input_output=False,
        )
        return tf.ensure_shape(result, shape)


class RehearsedCollectives(Collectives):
    """Allocates what the collectives of several replicas allocate, and exchanges nothing: other replicas may be out of
    memory, and this one would wait for them.

    Args:
        num_pieces: the replicas that would exchange.
        in_xla: whether XLA compiles what waits for the exchange, as on a TPU.
    """

    def __init__(self, num_pieces: int, in_xla: bool = False) -> None:
        self.num_pieces, self.is_one_program = num_pieces, in_xla

    def _after(self, first: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return _after_in_xla(first, tensors) if self.is_one_program else super()._after(first, tensors)

    def _place(self) -> int:
        return 0

    def _gather(self, pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [tf.concat([piece] * self.num_pieces, axis=0) for piece in pieces]

    def _reduce_scatter(self, summands: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        joined = tf.concat([tf.reshape(summand, [self.num_pieces, -1]) for summand in summands], axis=1)
        parts = tf.split(joined[0], [math.prod(summand.shape) // self.num_pieces for summand in summands])
        return [
            tf.reshape(part, [summand.shape[0] // self.num_pieces, *summand.shape[1:]])
            for part, summand in zip(parts, summands, strict=True)
        ]

    def _all_reduce(self, summand: tf.Tensor) -> tf.Tensor:
        return tf.identity(summand)

    def _all_to_all(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        parts = [tf.reshape(tensor, [self.num_pieces, -1]) for tensor in tensors]
        flat = tf.concat(parts, axis=1)
        received = tf.reverse(flat, axis=[0])  # A second array, as the operation's result is.
        own = tf.split(received, [part.shape[1] for part in parts], axis=1)
        return [tf.reshape(part, tensor.shape) for part, tensor in zip(own, tensors, strict=True)]


def make_collectives(strategy: tf.distribute.Strategy, num_pieces: int) -> Collectives:
    """Returns the collectives of a run's replicas, num_pieces of which are a group. Every worker calls it at the same
    time.
    """
    if device_kind(strategy) == "TPU":
        return XlaCollectives(strategy.num_replicas_in_sync, num_pieces)
    return TensorFlowCollectives(strategy, num_pieces)


def in_a_function(function: Callable, is_compiled: bool = False) -> Callable:
    """Wraps a function of tensors in a tf.function that is not inlined. Call it for every replica, whose operations and
    tensors the function may use.

    TensorFlow matches the messages of a collective operation by a key that holds the frame of the tf.while_loop around
    it, and the replicas of a process have different frames. Inside a called function the key holds no frame.

    Args:
        function: a function of tensors.
        is_compiled: whether XLA compiles it. Then it has no collective operations.
    """
    how = {"jit_compile": True} if is_compiled else {"experimental_attributes": {"_noinline": True}}
    traced = tf.function(function, autograph=False, **how)

    def call(*arguments: Any) -> Any:
        # TensorFlow takes the functions of all replicas for one that is traced again and again, and warns, unless they
        # are traced by get_concrete_function.
        return traced.get_concrete_function(*arguments)(*arguments)

    return call


def _after_in_xla(first: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    # XLA sees no control dependencies.
    return list(gen_xla_ops.xla_optimization_barrier([*tensors, first])[:-1])


def _number() -> int:
    """Returns the number that tf.distribute gives the replica which is being traced."""
    return int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))


def _by_dtype(run: Callable[[Sequence[tf.Tensor]], list[tf.Tensor]], tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns run of tensors, which gets those of one dtype at a time."""
    found: dict[int, tf.Tensor] = {}
    for dtype in dict.fromkeys(each.dtype for each in tensors):
        places = [place for place, each in enumerate(tensors) if each.dtype == dtype]
        found |= zip(places, run([tensors[place] for place in places]), strict=True)
    return [found[place] for place in range(len(tensors))]


def _type_of(shape: Sequence[int], dtype: tf.DType) -> str:
    """Returns a tensor's type in StableHLO, such as tensor<2x3xf32>.

    Raises:
        ValueError: the dtype is not a floating-point dtype.
    """
    if not dtype.is_floating:
        raise ValueError(f"replicas exchange floating-point numbers, not {dtype.name}")
    kind = "bf16" if dtype == tf.bfloat16 else f"f{8 * dtype.size}"
    return f"tensor<{''.join(f'{size}x' for size in shape)}{kind}>"
