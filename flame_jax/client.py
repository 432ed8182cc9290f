"""Rank over gRPC: `RankingClient` for programs, `python -m flame_jax.client rank` for people.

`python -m flame_jax.client models` is in `model_control.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from flame_jax import model_control
from flame_jax.commandline import refuse
from flame_jax.feature_config import StoreConfig
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.records import CorruptRecord
from flame_jax.pda.store import StoreError, usable_key
from flame_jax.request import History
from flame_jax.server.proto import ranking_pb2, ranking_pb2_grpc

PROG = "python -m flame_jax.client"
DEFAULT_TARGET = "127.0.0.1:50051"
MAX_MESSAGE = 16 << 20


@dataclass(frozen=True)
class Ranking:
    """An answer.

    Attributes:
        scores: task -> float32[C], probabilities in the order of the candidates sent.
        top_ids: int64[k], best first by the first task; empty unless asked for.
        top_scores: float32[k].
        flags: `degraded`, `unknown_user`, `truncated_history`, `unknown_items`, `missing_items`.
        timings_us: server-side microseconds per stage, and `batches`.
        latency_ms: the whole call as the caller saw it.
    """

    scores: dict[str, np.ndarray]
    top_ids: np.ndarray
    top_scores: np.ndarray
    model: str
    version: str
    request_id: str
    flags: dict[str, int | bool]
    timings_us: dict[str, int]
    latency_ms: float


class RankingClient:
    """A connection to one server; safe to share between threads.

    Args:
        target: HOST:PORT.
    """

    def __init__(self, target: str = DEFAULT_TARGET) -> None:
        size = [("grpc.max_send_message_length", MAX_MESSAGE), ("grpc.max_receive_message_length", MAX_MESSAGE)]
        self._channel = grpc.insecure_channel(target, options=size)
        self._stub: Any = ranking_pb2_grpc.RankingServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def rank(
        self,
        user: str,
        candidates: Sequence[int] | np.ndarray,
        *,
        top_k: int = 0,
        tasks: Sequence[str] = (),
        history: History | None = None,
        context: Mapping[str, int | float] | None = None,
        item_features: Mapping[str, Sequence[float] | np.ndarray] | None = None,
        scenario: str = "",
        model: str = "",
        version: str = "",
        request_id: str = "",
        traffic_class: str = "",
        request_time: int | None = None,
        timeout: float | None = None,
    ) -> Ranking:
        """Score candidates for a user; see `ranking.proto` for the fields.

        Args:
            candidates: external item ids, int64[C].
            history: sent instead of the store's; see `flame_jax.request.History`.
            item_features: [C] integers, or floats for a numeric feature, of the item features that come with the
                request.
            timeout: seconds; the server's default when None.

        Raises:
            grpc.RpcError: the call failed; its details begin with the server's fixed code.
            ValueError: candidates are not integers, or not int64.
        """
        ids = np.asarray(candidates)
        if ids.size and (ids.dtype.kind not in "iu" or (ids.dtype.kind == "u" and ids.max() > np.iinfo(np.int64).max)):
            hint = "; strings become ids by flame_jax.data.keys.stable_key" if ids.dtype.kind in "SUO" else ""
            raise ValueError(f"candidates must be int64 item ids, not {ids.dtype}{hint}")
        request = ranking_pb2.RankRequest(
            user=user,
            model=model,
            version=version,
            scenario=scenario,
            request_id=request_id,
            traffic_class=traffic_class,
            request_time=request_time,
            candidate_ids=ids.astype("<i8").tobytes(),
            tasks=tasks,
            top_k=top_k,
        )
        if history is not None:
            request.history.item_ids = history.item_ids.astype("<i8").tobytes()
            request.history.actions = history.actions.astype("<i4").tobytes()
            request.history.timestamps = history.timestamps.astype("<i8").tobytes()
            request.history.SetInParent()
        for name, value in (context or {}).items():
            if isinstance(value, (int, np.integer)):
                request.context[name].integer = int(value)
            else:
                request.context[name].number = value
        for name, values in (item_features or {}).items():
            column = np.asarray(values)
            request.item_features[name] = column.astype("<f4" if column.dtype.kind == "f" else "<i8").tobytes()
        started = time.perf_counter()
        answer = self._stub.Rank(request, timeout=timeout)
        latency = (time.perf_counter() - started) * 1e3
        return Ranking(
            scores={task.task: np.frombuffer(task.values, "<f4") for task in answer.scores},
            top_ids=np.frombuffer(answer.top.item_ids, "<i8"),
            top_scores=np.frombuffer(answer.top.values, "<f4"),
            model=answer.model,
            version=answer.version,
            request_id=answer.request_id,
            flags=_fields(answer.flags),
            timings_us=_fields(answer.timings),
            latency_ms=latency,
        )


def _fields(message: Any) -> dict[str, Any]:
    """Every scalar field of a message, defaults included."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(prog=PROG, description="Call a FLAME-JAX server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model_control.add_commands(commands.add_parser("models", help="see and change what a server serves"))
    rank = commands.add_parser("rank", help="rank items for one user")
    rank.add_argument("--target", default=DEFAULT_TARGET, metavar="HOST:PORT", help="server (default %(default)s)")
    rank.add_argument("--user", required=True, metavar="KEY", help="the user's key in the store")
    rank.add_argument("--top", type=_count, default=10, metavar="N", help="items to show (default %(default)s)")
    rank.add_argument(
        "--candidates", type=_ids, metavar="ID,ID,...", help="item ids; default: what the store has and the user lacks"
    )
    rank.add_argument(
        "--store",
        default=StoreConfig().path,
        metavar="DIR",
        help="local store for titles, recent likes and candidates (default %(default)s)",
    )
    rank.add_argument(
        "--time", type=int, metavar="SECONDS", help="request time; default: the user's last event, else now"
    )
    rank.add_argument("--json", action="store_true", help="one JSON object on stdout")
    rank.set_defaults(run=_rank, as_text=_as_text)
    args = parser.parse_args(argv)
    try:
        shown = args.run(args)
    except grpc.RpcError as error:
        refuse(PROG, f"{error.code().name}: {error.details()}", status=1)
    except (StoreError, CorruptRecord, ValueError, OverflowError) as error:
        refuse(PROG, str(error), status=1)
    print(json.dumps(shown) if args.json else args.as_text(shown))


def _ids(text: str) -> np.ndarray:
    try:
        return np.array([int(part) for part in text.split(",")], np.int64)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of 64-bit item ids") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def _rank(args: argparse.Namespace) -> dict[str, Any]:
    with contextlib.closing(_Catalogue(args.store)) as catalogue:
        history = catalogue.history(args.user)
        candidates = catalogue.unseen(history) if args.candidates is None else args.candidates
        seconds = args.time if args.time is not None else int(history.timestamps[-1]) if len(history) else None
        with RankingClient(args.target) as client:
            answer = client.rank(args.user, candidates, top_k=args.top, request_time=seconds)
        liked = history.item_ids[history.actions == history.actions.max()][-5:][::-1] if len(history) else []
        return {
            "user": args.user,
            "store": args.store if catalogue.missing is None else None,
            "recent_likes": [{"item": int(i), "title": catalogue.title(i)} for i in liked],
            "candidates": len(candidates),
            "ranked": [
                {"item": int(i), "title": catalogue.title(i), "score": float(s)}
                for i, s in zip(answer.top_ids, answer.top_scores, strict=True)
            ],
            "model": answer.model,
            "version": answer.version,
            "flags": answer.flags,
            "timings_us": answer.timings_us,
            "latency_ms": answer.latency_ms,
        }


class _Catalogue:
    """What a local store tells of items and users; without one, ids stand for themselves."""

    def __init__(self, path: str) -> None:
        self.missing: StoreError | None = None
        try:
            self._store: LmdbStore | None = LmdbStore(path)
        except StoreError as error:
            self._store, self.missing = None, error

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def history(self, user: str) -> History:
        if self._store is None or not usable_key(user):
            return History.empty()
        record = self._store.read(user, np.empty(0, np.int64)).user
        return record.history if record else History.empty()

    def unseen(self, history: History) -> np.ndarray:
        if self._store is None:
            raise StoreError(f"{self.missing} (name a store with --store, or items with --candidates)")
        return np.setdiff1d(self._store.item_ids(), history.item_ids)

    def title(self, item: int) -> str:
        return (self._store.titles([item])[0] if self._store else None) or str(item)


def _as_text(shown: Mapping[str, Any]) -> str:
    lines = [f"titles, likes and candidates from {shown['store']}"] if shown["store"] else []
    lines.append(f"user {shown['user']} recently gave the highest marks to")
    lines += [f"    {like['title']}" for like in shown["recent_likes"]] or ["    nothing known"]
    lines.append(f"best of {shown['candidates']} candidates by {shown['model']} version {shown['version']}")
    lines += [f"{n:4d}  {row['score']:.4f}  {row['title']}" for n, row in enumerate(shown["ranked"], start=1)]
    stages = "  ".join(
        f"{name.removesuffix('_us')} {us}" for name, us in shown["timings_us"].items() if name != "batches"
    )
    lines.append(f"server microseconds: {stages}")
    lines.append(f"latency {shown['latency_ms']:.1f} ms in {shown['timings_us']['batches']} batches")
    if raised := [f"{name}={value}" for name, value in shown["flags"].items() if value]:
        lines.append("flags: " + ", ".join(raised))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
