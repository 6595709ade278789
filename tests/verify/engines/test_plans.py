from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import assert_refused, verify
from support.tiny_model import write_tiny_model
from support.tiny_models import TINY
from verify.engines.plans import Setting, find_shape, plan_at, stretches
from verify.kernels.plans.policy import POLICIES
from verify.kernels.plans.shapes import shape_named


@pytest.mark.parametrize(("gpus", "threshold"), [(1, 8192), (2, 16_384), (4, 32_768), (8, 65_536)])
def test_the_split_of_glm_starts_later_on_more_gpus(gpus: int, threshold: int) -> None:
    done = verify(
        *("plan", "--arch", "glm4moe", "--gpus", str(gpus), "--split-mode", "graph", "--json"),
        *("--n-kv", f"{threshold - 256},{threshold}"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {p["policy"]: p for p in json.loads(done.stdout)["policies"]}
    for name in ("ik-1183", "ik-1190", "ik-1192"):
        _, start = found[name]["starts"]
        assert (start["padded"], start["from_n_kv"]) == (threshold, threshold - 255)
        assert start["plan"] == "8+4, 2 launches on copies of Q"
        below, at = found[name]["plans"]
        assert (below["plan"], below["walks"]) == ("4+4+4, one launch", 3)
        assert (at["plan"], at["walks"]) == ("8+4, 2 launches on copies of Q", 2)
    assert f"from n_kv {threshold} ({threshold - 255} unpadded) 8+4" in done.stderr


def test_glm_flash_splits_above_8192() -> None:
    setting = Setting(shape_named("glm-4.7-flash"))
    _, start = stretches(POLICIES["ik-1182"], setting)
    assert (start.from_n_kv, start.head_groups, start.launch) == (8193, (16, 4), "views")
    (only,) = stretches(POLICIES["ik-1192"], setting)
    assert only.name == "20 padded to 32, one launch"


def test_padded_plans_and_their_waste() -> None:
    setting = Setting(shape_named("glm-4.5-air"))
    padded = plan_at(POLICIES["ik-1193"], setting, 32_768)
    assert (padded.name, padded.waste, padded.walks) == ("12 padded to 16, one launch", 0.25, 1)
    mainline = plan_at(POLICIES["mainline"], setting, 32_768)
    assert (mainline.name, mainline.waste) == ("8+4 padded to 8+8, one launch", 0.25)
    assert plan_at(POLICIES["before"], setting, 32_768).waste == 0


def test_predicted_bytes_by_hand() -> None:
    # 2 of 8 KV heads, 1,000 keys padded to 1,024, K and V of 128 numbers: 524,288 numbers.
    setting = Setting(shape_named("glm-4.5-air"), gpus=4, split_mode="graph")
    found = plan_at(POLICIES["before"], setting, 1000)
    assert (found.bytes_read, found.bytes_written) == (3 * 2 * 524_288, 0)
    found = plan_at(POLICIES["before"], setting._replace(cache_type="q8_0"), 1000)
    assert found.bytes_written == 2 * 524_288
    assert found.bytes_read == 3 * 2 * 524_288 + 524_288 * 34 // 32
    # MLA reads K alone: V lies in it.
    found = plan_at(POLICIES["ik-1192"], Setting(shape_named("glm-4.7-flash")), 256)
    assert found.bytes_read == 2 * 256 * 576


def test_a_quantised_cache_never_splits_before_1190() -> None:
    setting = Setting(shape_named("glm-4.5-air"), cache_type="q8_0")
    assert len(stretches(POLICIES["ik-1183"], setting)) == 1
    assert len(stretches(POLICIES["ik-1190"], setting)) == 2


def test_a_file_gives_its_own_shape(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    shape = find_shape(str(path))
    assert (shape.q_heads, shape.kv_heads, shape.k_size, shape.v_size) == (4, 2, 16, 16)
    assert find_shape("96/8x128").ratio == find_shape("glm4moe").ratio == 12


def versions(*arguments: str) -> dict[str, str]:
    done = verify("plan", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([x for x in lines if " -> " in x]) == 8 - 1, done.stdout
    return dict(line.split(": ", 1) for line in lines if " -> " in line or "precision" in line)


def test_seven_lines_say_between_which_versions_a_model_is_affected() -> None:
    glm = versions("--arch", "glm4moe")
    assert glm["before -> ik-1182"] == "your model is not affected"
    assert glm["ik-1182 -> ik-1183"] == (
        "your model is affected from n_kv 8192 (7937 unpadded): 4+4+4, one launch becomes 8+4, 2 launches on"
        " copies of Q"
    )
    assert glm["ik-1193 -> ik-2026-08"] == "your model is not affected"
    assert (
        "12 heads, each alone, one launch (vector kernel, float32 sums)"
        in glm["mainline -> mainline-2026-10"]
    )
    assert glm["mainline-2026-10"] == (
        "precision jumps at n_kv 8192 (7937 unpadded): vector kernel, float32 sums, then mma kernel,"
        " float16 sums"
    )
    assert "precision" not in str(versions("--arch", "glm4moe", "--gpu", "ampere"))
    flash = versions("--arch", "glm-4.7-flash")
    assert flash["before -> ik-1182"].startswith("your model is affected from n_kv 8448 (8193 unpadded)")
    assert flash["ik-1182 -> ik-1183"] == "your model is not affected"
    # Four query tokens a call: no version's gate of decode opens.
    assert versions("--n-q", "4")["ik-1182 -> ik-1183"] == "your model is not affected"


def test_windowed_layers_and_others_are_told_apart() -> None:
    found = versions("--arch", "gemma-3")["ik-1193 -> ik-2026-08"]
    assert "windowed layers: at every length: 2, one launch (mma kernel, float16 sums) becomes" in found
    assert found.endswith("other layers are not")


def test_windowed_layers_have_heads_of_their_own(tmp_path: Path) -> None:
    """gemma4 and step35 have other sizes or more heads there than in the layers that see all keys."""
    path = str(TINY["gemma4"].write(tmp_path / "tiny.gguf"))
    done = verify("plan", "-m", path, "--json")
    found = json.loads(done.stdout)
    assert [found["shape"][k] for k in ("q_heads", "kv_heads", "k_size", "sliding_window")] == [
        4,
        1,
        24,
        None,
    ]
    windowed = found["windowed_shape"]
    assert [windowed[k] for k in ("q_heads", "kv_heads", "k_size", "sliding_window")] == [4, 2, 16, 6]
    assert "windowed layers: tiny.gguf (4/2 heads, r = 2, size 16), the last 6 keys" in done.stderr
    named = json.loads(verify("plan", "--arch", "gemma4", "--json").stdout)
    assert (named["shape"]["k_size"], named["windowed_shape"]["k_size"]) == (512, 256)
    assert {v["layers"] for v in named["versions"]} == {"windowed layers", "other layers"}
    assert json.loads(verify("plan", "--arch", "glm4moe", "--json").stdout)["windowed_shape"] is None


def test_the_table_comes_where_it_is_asked_for() -> None:
    assert "KV walks" not in verify("plan").stdout
    assert "KV walks" in verify("plan", "--n-kv", "4096").stdout
    one = verify("plan", "--policy", "ik-1183").stdout
    assert "ik-1183: 4+4+4, one launch (mma kernel, float16 sums); from n_kv 8192" in one
    assert " -> " not in one


def test_a_file_of_an_architecture_that_cannot_be_run_has_a_plan(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    renamed = path.read_bytes().replace(b"llama", b"lxmad")
    path.write_bytes(renamed)
    shape = find_shape(str(path))
    assert (shape.q_heads, shape.kv_heads, shape.k_size, shape.v_size) == (4, 2, 16, 16)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--n-q", "0"), "--n-q 0: expected query tokens from 1"),
        (("--gpu", "volta"), "--gpu volta: expected one of pascal, turing"),
        (("--arch", "glm5moe"), "did you mean 'glm4moe'"),
        (("--arch", "none.gguf"), "none.gguf"),
        (("--cache-type", "q9"), "--cache-type q9: expected one of"),
        (("--gpus", "0"), "--gpus 0"),
        (("--gpus", "3", "--split-mode", "graph"), "8 KV heads are not equal shares for 3 GPUs"),
        (("--split-mode", "row"), "--split-mode row: expected layer or graph"),
        (("--policy", "ik-1"), "did you mean"),
        (("--n-kv", "0"), "--n-kv 0"),
    ],
)
def test_bad_input(more: tuple[str, ...], said: str) -> None:
    assert_refused(verify("plan", *more), said)
