"""Names of places: what patterns mean, and what is said when they mean nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks import Site, SiteError, SiteSpace, Topology
from hooks.sites import glob, split

SPACE = SiteSpace({"hook_embed": (), "blocks.0.hook_resid_post": (), "blocks.1.hook_resid_post": (("", 8),),
                   "blocks.2.hook_resid_post": (("", 8),), "L.1.hook_out": (("h", 2), ("l", 3))})


def names(patterns: object) -> list[str]:
    return [str(site) for site in SPACE.resolve(patterns)]  # type: ignore[arg-type]


def test_a_looped_name_means_every_loop_and_minus_one_the_last() -> None:
    assert names("blocks.1.hook_resid_post") == [f"blocks.1.hook_resid_post@{k}" for k in range(8)]
    assert names("blocks.1.hook_resid_post@-1") == ["blocks.1.hook_resid_post@7"]
    assert names("blocks.1.hook_resid_post@2:4") == ["blocks.1.hook_resid_post@2", "blocks.1.hook_resid_post@3"]
    assert names("blocks.1.hook_resid_post@-2:") == ["blocks.1.hook_resid_post@6", "blocks.1.hook_resid_post@7"]


def test_globs_cover_looped_and_unlooped_names() -> None:
    assert names("blocks.*.hook_resid_post@3") == ["blocks.1.hook_resid_post@3", "blocks.2.hook_resid_post@3"]
    assert len(names("blocks.*.hook_resid_post")) == 1 + 8 + 8
    assert len(names(None)) == len(SPACE.all()) == 1 + 1 + 8 + 8 + 6


@pytest.mark.parametrize(("pattern", "accepted", "refused"), [
    ("layers.*.hook_out", ["layers.0.hook_out", "layers.12.hook_out"], ["layers.0.attn.hook_out", "layers.hook_out"]),
    ("layers.?.hook_out", ["layers.0.hook_out"], ["layers...hook_out", "layers.12.hook_out"]),
    ("layers.[!0-1].hook_out", ["layers.2.hook_out"], ["layers.1.hook_out", "layers...hook_out"]),
    ("**.hook_out", ["hook_out", "core.hook_out", "core.0.attn.hook_out"], ["core.unhook_out", "core.hook_in"]),
    ("core.**", ["core.hook_in", "core.0.attn.hook_out"], ["core", "score.hook_in", "prelude.core.hook_in"]),
    ("core.**.attn.hook_out", ["core.attn.hook_out", "core.0.1.attn.hook_out"], ["core.0.attn.q.hook_out"]),
    ("**", ["hook_in", "core.0.hook_in"], []),
    ("*", ["hook_in"], ["core.0.hook_in"]),
    ("h**_out", ["hook_out", "h.0.hook_out"], ["core.hook_out"]),
    ("a+b.(c).hook_out", ["a+b.(c).hook_out"], ["aab.c.hook_out"]),
])
def test_one_star_stays_inside_a_part_and_two_cross_parts(pattern: str, accepted: list[str],
                                                          refused: list[str]) -> None:
    assert [name for name in (*accepted, *refused) if glob(pattern)(name)] == accepted


def test_what_runs_once_may_be_a_loop_of_one_where_that_is_not_known() -> None:
    space = SiteSpace({"block.hook_out": (), "core.hook_out": (("", 2),)}, guessed=True)
    for at in ("0", "-1", "*"):
        assert [str(site) for site in space.resolve(f"block.hook_out@{at}")] == ["block.hook_out"]
    assert [str(site) for site in space.resolve("*.hook_out@0")] == ["core.hook_out@0"]
    with pytest.raises(SiteError, match="runs once per forward and takes no '@1'"):
        space.resolve("block.hook_out@1")


def test_aliases_stand_for_the_names_that_they_name() -> None:
    space = SiteSpace({"layers.0.hook_out": (("", 2),), "norm.hook_out": ()},
                      aliases={"layers.1.hook_out": "layers.0.hook_out", "tied.norm.hook_out": "norm.hook_out"})
    assert str(space.one("layers.1.hook_out@-1")) == "layers.0.hook_out@1"
    assert [str(site) for site in space.resolve("layers.*.hook_out@0")] == ["layers.0.hook_out@0"]
    assert [str(site) for site in space.resolve(["tied.**", "layers.1.hook_out@1"])] == [
        "layers.0.hook_out@1", "norm.hook_out"]
    assert len(space.all()) == 3


def test_several_patterns_give_each_site_once_in_the_order_of_the_space() -> None:
    assert names(["blocks.1.hook_resid_post@1", "hook_embed", "blocks.1.*@0:2"]) == [
        "hook_embed", "blocks.1.hook_resid_post@0", "blocks.1.hook_resid_post@1"]


def test_predicates_see_names_without_loops() -> None:
    seen: list[str] = []
    assert len(SPACE.resolve(lambda name: not seen.append(name) and name.startswith("blocks.1"))) == 8
    assert seen == list(SPACE.names)


def test_compiled_regular_expressions_are_searched_for_in_names_without_loops() -> None:
    assert names(re.compile(r"blocks\.[12]\..*post$")) == names("blocks.[12].hook_resid_post")
    assert names(re.compile("resid")) == names("**resid**")
    assert names([re.compile("EMBED", re.IGNORECASE), "blocks.1.hook_resid_post@2"]) == [
        "hook_embed", "blocks.1.hook_resid_post@2"]
    with pytest.raises(SiteError, match=r"re\.compile\('resid_mid'\) is found in none of the sites of this run"):
        names(re.compile("resid_mid"))
    with pytest.raises(SiteError, match=r"\(names have no loops: choose those with a glob, 'name@3'\) is found"):
        names(re.compile(r"blocks\.1\.hook_resid_post@2"))
    with pytest.raises(SiteError, match=r"A site is a string such as"):
        names([re.compile(b"resid")])


def test_nested_cycles_have_two_indices() -> None:
    assert names("L.1.hook_out@h1.l2") == ["L.1.hook_out@h1.l2"]
    assert names("L.1.hook_out@h-1.l*") == [f"L.1.hook_out@h1.l{k}" for k in range(3)]
    assert names("L.1.hook_out@h*.l0") == ["L.1.hook_out@h0.l0", "L.1.hook_out@h1.l0"]


@pytest.mark.parametrize(("pattern", "message"), [
    ("blocks.1.hook_resid_post@8", r"'blocks.1.hook_resid_post@8' cannot fire: blocks.1.hook_resid_post runs 8 loops "
                                   r"here, numbered 0..7. Nearest: 'blocks.1.hook_resid_post@7'. Pass a larger"),
    ("blocks.1.hook_resid_post@-9", "cannot fire"),
    ("blocks.1.hook_resid_pots", "No site is called 'blocks.1.hook_resid_pots'. Nearest: 'blocks.1.hook_resid_post'"),
    ("hook_embed@0", "'hook_embed' runs once per forward and takes no '@0': write 'hook_embed'"),
    ("*.hook_resid_post", "A '*' stays inside one dotted part: '**.hook_resid_post' crosses parts. Nearest: 'blocks"),
    ("blocks.*", "A '*' stays inside one dotted part: 'blocks.**' crosses parts."),
    ("blocks.?hook_resid_post", "No site is called 'blocks.?hook_resid_post'. Nearest: 'blocks."),
    ("blocks.1.hook_resid_post@", "ends in '@': write a loop number after it"),
    ("blocks.1.hook_resid_post@x", "'x' is not a loop; write a number"),
    ("L.1.hook_out@3", "L.1.hook_out is looped over 2 cycles; write '@h0.l0'"),
    ("L.1.hook_out@l0.h0", "the loops of L.1.hook_out are written '@h0.l0'"),
    ([], "An empty list of sites"),
    ([3], "A site is a string such as"),
    (lambda name: False, "names_filter accepted none of the sites"),
])
def test_what_cannot_fire_is_refused_with_a_remedy(pattern: object, message: str) -> None:
    with pytest.raises(SiteError) as error:
        SPACE.resolve(pattern)  # type: ignore[arg-type]
    assert message.replace("\\", "") in str(error.value)


def test_one_site_is_one_site() -> None:
    assert SPACE.one("blocks.1.hook_resid_post@-1") == Site("blocks.1.hook_resid_post", (7,), ("",))
    with pytest.raises(SiteError, match=r"names 8 sites, from .*@0 to .*@7; say which one"):
        SPACE.one("blocks.1.hook_resid_post")


def test_split() -> None:
    assert split("name@3") == ("name", "3")
    assert split("name") == ("name", None)


@given(st.integers(0, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 9))
def test_unrolling_visits_every_layer_in_order(head: int, mid: int, tail: int, loops: int) -> None:
    topology = Topology(head, mid, tail, loops)
    unrolled = topology.unrolled()
    assert len(unrolled) == topology.depth == head + loops * mid + tail
    expected: list[tuple[int, int | None]] = [(layer, None) for layer in range(head)]
    for loop in range(loops):
        expected += [(head + i, loop) for i in range(mid)]
    expected += [(head + mid + i, None) for i in range(tail)]
    assert unrolled == expected
    assert all(topology.is_looped(layer) == (loop is not None) for layer, loop in unrolled)
    for depth, (layer, loop) in enumerate(unrolled):
        assert topology.site_at(depth) == f"blocks.{layer}.hook_resid_post" + ("" if loop is None else f"@{loop}")


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}\.[0-9]", fullmatch=True),
                       st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=6))
def test_every_site_resolves_to_itself(sizes: dict[str, list[int]]) -> None:
    space = SiteSpace({name: tuple((letter if len(counts) > 1 else "", n)
                                   for letter, n in zip("hl", counts, strict=False))
                       for name, counts in sizes.items()})
    sites = space.all()
    assert len(set(sites)) == len(sites)
    for site in sites:
        assert space.resolve(str(site)) == [site]
        assert space.one(str(site)) == site
