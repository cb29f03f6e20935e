"""Several machines as one: sums over ranks, shares of the work, and a heartbeat that ends a run whose rank is lost

Started by `mlx.launch`; alone, a rank is a world of one and nothing here costs anything. See docs/distributed.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UserError
from . import console

T = TypeVar("T")


# Seconds between heartbeats; without one before a rank counts as lost; for the main thread to end by itself first
BEAT, SILENCE, GRACE = 5.0, 30.0, 5.0


LOST = "start it again with --resume, on any number of machines"


class World:
    """The ranks of this run. Every method that says "together" must be called by all ranks, in the same order."""

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            print("\n".join(console.folded(line, sys.stdout) for line in text.split("\n")), flush=True)

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's rows: every row is in exactly one share, and rows next to each other are in different ones."""
        return rows[self.rank :: self.size]

    def _sum(self, array: mx.array) -> mx.array:
        try:
            total = mx.distributed.all_sum(array, group=self._group, stream=mx.cpu)
            mx.eval(total)
            return total
        except RuntimeError as error:
            raise UserError(f"rank {self.rank} of {self.size}: another rank was lost ({error}): {LOST}") from None

    def sum(self, tree: Any) -> Any:
        """Together: a tree of arrays, summed over the ranks; the trees' shapes are the same on all."""
        if self.size == 1:
            return tree
        leaves = tree_flatten(tree)
        summed: dict[str, mx.array] = {}
        for dtype in dict.fromkeys(leaf.dtype for _, leaf in leaves):
            same = [(name, leaf) for name, leaf in leaves if leaf.dtype == dtype]
            flat = self._sum(mx.concatenate([leaf.reshape(-1) for _, leaf in same]))
            ends = np.cumsum([leaf.size for _, leaf in same]).tolist()
            summed |= {n: part.reshape(a.shape) for (n, a), part in zip(same, mx.split(flat, ends[:-1]), strict=True)}
        return tree_unflatten([(name, summed[name]) for name, _ in leaves])

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Together: each number summed over the ranks, in float32."""
        if self.size == 1:
            return dict(numbers)
        return dict(zip(numbers, map(float, np.array(self._sum(mx.array(list(numbers.values()))))), strict=True))

    def any(self, flag: bool) -> bool:
        """Together: whether it is set on any rank."""
        return flag if self.size == 1 else bool(self._sum(mx.array([float(flag)])).item())

    def from_first(self, value: T) -> T:
        """Together: rank 0's value (JSON); the others' are ignored."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        length = int(np.array(self._sum(mx.array([len(text)], mx.int32)))[0])
        data = np.zeros(length, np.int32)
        data[: len(text)] = np.frombuffer(text, np.uint8)
        return json.loads(bytes(np.array(self._sum(mx.array(data))).astype(np.uint8)))

    def arrays_from_first(self, tree: Any) -> Any:
        """Together: rank 0's tree of arrays; the others give None."""
        if self.size == 1:
            return tree
        leaves = dict(tree_flatten(tree)) if self.first else {}
        form = self.from_first(
            [(name, list(a.shape), str(a.dtype).removeprefix("mlx.core.")) for name, a in leaves.items()]
        )
        got = [
            (name, leaves[name] if self.first else mx.zeros(shape, getattr(mx, dtype))) for name, shape, dtype in form
        ]
        return self.sum(tree_unflatten(got))

    def agree(self, what: str, value: str) -> None:
        """Together: raises UserError on a rank where `value` is not rank 0's."""
        differs = self.from_first(value) != value
        if self.any(differs):
            here = f"rank {self.rank}" if differs else "another rank"
            raise UserError(f"{what}: {here} differs from rank 0: give every machine the same model, data and settings")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a rank that is lost ends this process within SILENCE + GRACE seconds, with a message.

        A rank that dies breaks the collectives, which `_sum` reports at once. One that is asleep or unplugged only
        leaves them waiting, and neither MLX nor mlx.launch ends the run then: that is what the heartbeat is for.
        """
        if self.size == 1:
            yield
            return
        ends = self._connect()
        over = threading.Event()
        for rank, end in ends.items():
            threading.Thread(target=self._listen, args=(rank, end, over), daemon=True).start()
        threading.Thread(target=self._beat, args=(list(ends.values()), over), daemon=True).start()
        try:
            yield
            over.set()
            for end in ends.values():
                with contextlib.suppress(OSError):
                    end.sendall(b"q")  # finished: closing is not a loss
        finally:
            over.set()
            for end in ends.values():
                end.close()

    def _connect(self) -> dict[int, socket.socket]:
        """Rank 0: a socket for each other rank; others: one to rank 0. A rank that cannot reach rank 0 has none and
        says so."""
        server = socket.create_server(("", 0), backlog=self.size) if self.first else None
        if server is not None:
            server.settimeout(SILENCE)
        places, token = self.from_first((self._addresses(server), secrets.token_hex(16)))
        ends: dict[int, socket.socket] = {}
        if server is None:
            for host, port in places:
                with contextlib.suppress(OSError):
                    ends[0] = socket.create_connection((host, port), timeout=3)
                    ends[0].sendall(token.encode() + self.rank.to_bytes(4, "big"))
                    break
            else:
                console.notice(
                    f"note: rank {self.rank} cannot reach rank 0 at {places}: if a machine falls asleep, the run "
                    "waits for it"
                )
        reached = int(self.sum_numbers({"reached": float(bool(ends))})["reached"])
        while server is not None and len(ends) < reached:
            try:
                end, _ = server.accept()
            except TimeoutError:
                raise UserError(
                    f"rank {self.rank} of {self.size}: another rank was lost before the run began: start it again"
                ) from None
            end.settimeout(SILENCE)
            with contextlib.suppress(OSError):
                handshake = end.recv(len(token) + 4, socket.MSG_WAITALL)
                if secrets.compare_digest(handshake[:-4], token.encode()):  # others on the network may connect too
                    ends[int.from_bytes(handshake[-4:], "big")] = end
                    continue
            end.close()
        if server is not None:
            server.close()
        for end in ends.values():
            end.settimeout(SILENCE)
        return ends

    def _addresses(self, server: socket.socket | None) -> list[tuple[str, int]]:
        if server is None:
            return []
        hosts = [socket.gethostname()]
        with contextlib.suppress(OSError, ValueError, LookupError):  # the ring's own file: each rank's addresses
            ring = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
            hosts = [address.rsplit(":", 1)[0] for address in ring[0]] + hosts
        if "MLX_JACCL_COORDINATOR" in os.environ:
            hosts.insert(0, os.environ["MLX_JACCL_COORDINATOR"].rsplit(":", 1)[0])
        return [(host, server.getsockname()[1]) for host in hosts]

    def _beat(self, ends: list[socket.socket], over: threading.Event) -> None:
        while not over.wait(BEAT):
            for end in ends:
                with contextlib.suppress(OSError):  # `_listen` reports it
                    end.sendall(b".")

    def _listen(self, rank: int, end: socket.socket, over: threading.Event) -> None:
        why = "it ended"
        try:
            while data := end.recv(64):
                if b"q" in data:
                    return
        except TimeoutError:
            why = f"no heartbeat for {SILENCE:.0f} s"
        except OSError as error:
            why = error.strerror or str(error)
        if not over.wait(GRACE):  # the main thread may notice it too, with a better message
            self._leave(rank, why)

    def _leave(self, rank: int, why: str) -> NoReturn:
        console.notice(f"error: rank {self.rank} of {self.size}: rank {rank} was lost ({why}): {LOST}")
        os._exit(2)


@functools.cache
def world() -> World:
    return World(mx.distributed.init())
