"""The command line of the client, against a live server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from flame_jax import client
from tests.server.live import Files, Server, build, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Files, Server]]:
    folder = tmp_path_factory.mktemp("client")
    files = build(folder, ladder=((160, 96),))
    with serving(files, folder / "log") as server:
        yield files, server


def run(served: tuple[Files, Server], *flags: str) -> None:
    files, server = served
    client.main(["rank", "--target", server.target, "--store", str(files.store), *flags])


def test_json_ranks_what_the_user_lacks_by_score(
    served: tuple[Files, Server], capsys: pytest.CaptureFixture[str]
) -> None:
    run(served, "--user", "u7", "--top", "5", "--json")
    shown = json.loads(capsys.readouterr().out)
    seen = set(served[0].histories["u7"].item_ids.tolist())
    scores = [row["score"] for row in shown["ranked"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert not seen & {row["item"] for row in shown["ranked"]}
    assert shown["candidates"] == len(served[0].items) - len(seen)
    assert {like["item"] for like in shown["recent_likes"]} <= seen
    assert shown["timings_us"]["compute_us"] > 0
    assert shown["latency_ms"] > 0


def test_text_shows_titles(served: tuple[Files, Server], capsys: pytest.CaptureFixture[str]) -> None:
    run(served, "--user", "u7", "--candidates", "3,2147483655,4")
    lines = capsys.readouterr().out.splitlines()
    ranked = [line.split(maxsplit=2)[2] for line in lines if line[:4].strip().isdigit()]
    assert sorted(ranked) == ["2147483655", "Title 3", "Title 4"]


def test_an_unknown_user_is_ranked_and_flagged(
    served: tuple[Files, Server], capsys: pytest.CaptureFixture[str]
) -> None:
    run(served, "--user", "nobody")
    out = capsys.readouterr().out
    assert "nothing known" in out
    assert "unknown_user=True" in out


def test_without_a_store_candidates_must_be_named(
    served: tuple[Files, Server], capsys: pytest.CaptureFixture[str]
) -> None:
    _, server = served
    flags = ["rank", "--target", server.target, "--store", "/nonexistent", "--user", "u7"]
    with pytest.raises(SystemExit) as ended:
        client.main(flags)
    assert ended.value.code == 1
    assert "--candidates" in capsys.readouterr().err
    client.main([*flags, "--candidates", "3,4", "--json"])
    assert len(json.loads(capsys.readouterr().out)["ranked"]) == 2


def test_a_fault_ends_in_one_line(served: tuple[Files, Server], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(served, "--user", "u7", "--candidates", "-5")
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "NEGATIVE_ITEM" in error


def test_no_server_ends_in_one_line(served: tuple[Files, Server], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        client.main(["rank", "--target", "127.0.0.1:1", "--store", str(served[0].store), "--user", "u7"])
    assert ended.value.code == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
