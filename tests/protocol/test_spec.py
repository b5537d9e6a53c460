"""The spec says what the code does: its tables are compared with the code they describe."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from nextgpu_protocol import limits
from nextgpu_protocol.dht import (
    Contact,
    Find,
    FindNode,
    Found,
    Nodes,
    Store,
    Stored,
    StoreItem,
    StoreResult,
)
from nextgpu_protocol.envelope import TYPE_NAMES
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.messages import (
    UNIT_STATUSES,
    Announcement,
    Capacity,
    DeviceInfo,
    HeldToken,
    LaneTicket,
    Metering,
    Offer,
    Predecessor,
    Receipt,
    ReceiptAck,
    Refusal,
    Succession,
    Successions,
    Successor,
    Token,
    TokenBlock,
    TokenUse,
    UnitHeader,
    UnitRequest,
    UnitResume,
    UnitResumed,
    WipeStep,
)
from nextgpu_protocol.records import RecordKind, UnitManifest, UnitSummary
from tests.protocol.vectors import PROTOCOL

SPEC = PROTOCOL / "spec"
PAGES = sorted(SPEC.glob("*.md"))
MESSAGES: list[Any] = [
    *(UnitRequest, DeviceInfo, Offer, UnitHeader, Receipt, Metering, WipeStep, ReceiptAck),
    *(Capacity, Refusal, UnitManifest, UnitSummary),
]


def page(name: str) -> str:
    return (SPEC / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands under the heading `title`, up to the next heading of its level."""
    found = re.search(rf"^##+ {re.escape(title)}$(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {i for i, row in enumerate(cells) if set(row[0]) == {"-"}}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def type_text(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"list of {type_text(typing.get_args(hint)[0])}"
    return "text" if hint is str else str(hint.__name__)


PAGE_OF: dict[Any, str] = {
    **dict.fromkeys((TokenBlock, TokenUse, Token, HeldToken), "75-tokens.md"),
    LaneTicket: "48-lane.md",
    **dict.fromkeys((UnitResume, UnitResumed), "47-resuming.md"),
    **dict.fromkeys((Announcement, Contact, FindNode, Nodes, StoreItem), "72-discovery.md"),
    **dict.fromkeys((Store, StoreResult, Stored, Find, Found), "72-discovery.md"),
    **dict.fromkeys((Successor, Predecessor, Succession, Successions), "15-succession.md"),
}


@pytest.mark.parametrize("cls", [*MESSAGES, *PAGE_OF])
def test_every_field_is_in_the_spec_with_its_type_and_in_its_order(cls: Any) -> None:
    hints = typing.get_type_hints(cls)
    wanted = [(f.name, type_text(hints[f.name])) for f in dataclasses.fields(cls)]
    table = rows(section(page(PAGE_OF.get(cls, "40-messages.md")), cls.__name__))
    assert [(row[0].strip("`"), row[1]) for row in table] == wanted


def test_every_limit_is_in_the_spec_with_its_value() -> None:
    in_code = {
        name: value
        for name, value in vars(limits).items()
        if name.isupper() and name not in {"KIB", "MIB", "GIB"}
    }
    assert {row[0]: int(row[1]) for row in rows(page("limits.md"))} == in_code
    assert all(row[2] for row in rows(page("limits.md")))


def test_every_frame_kind_is_in_the_spec_with_its_number() -> None:
    table = rows(section(page("30-framing.md"), "Frames"))
    assert {row[1]: int(row[0]) for row in table} == {k.name: k.value for k in FrameKind}


def test_every_record_kind_is_in_the_spec_with_its_number() -> None:
    table = rows(section(page("50-sealing.md"), "Records"))
    kinds = {k.name: k.value for k in RecordKind if k is not RecordKind.PADDING}
    assert {row[1]: int(row[0]) for row in table} == kinds


def test_every_signed_type_and_status_is_in_the_spec() -> None:
    types = section(page("20-envelope.md"), "Signing") + page("20-envelope.md")
    assert all(f"`{name}`" in types for name in TYPE_NAMES.values())
    table = rows(section(page("55-receipts.md"), "Status"))
    assert [row[0].strip("`") for row in table] == list(UNIT_STATUSES)


def test_every_code_that_a_page_names_exists() -> None:
    for path in PAGES:
        if path.name == "60-program.md":
            continue
        text = path.read_text(encoding="utf-8")
        codes = re.findall(r"\b(?:BAD|NOT|OVER|WRONG|UNKNOWN|UNEXPECTED|OLD|RATE)_[A-Z_]+\b", text)
        assert set(codes) <= set(ErrorCode.__members__), path.name


def test_every_test_that_the_attacks_page_names_exists() -> None:
    tests = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    named = [name for row in rows(section(page("attacks-and-limits.md"), "Defended"))
             for name in re.findall(r"`(\w+)`", row[-1])]  # fmt: skip
    assert len(named) > 20
    assert [name for name in named if f"def test_{name}(" not in tests] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_page_promises_what_can_not_be_kept(path: Path) -> None:
    text = " ".join(path.read_text(encoding="utf-8").lower().split())
    for words in ("zero knowledge", "zero-knowledge", "anonymous", "guaranteed deletion",
                  "proof of deletion", "host cannot see", "unbreakable"):  # fmt: skip
        assert words not in text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_page_has_a_status_and_is_in_the_index(path: Path) -> None:
    assert "status" in "\n".join(path.read_text(encoding="utf-8").splitlines()[:6]).lower()
    assert f"(spec/{path.name})" in (PROTOCOL / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*PAGES, PROTOCOL / "README.md", PROTOCOL / "vectors/README.md"],
                         ids=lambda path: f"{path.parent.name}/{path.name}")  # fmt: skip
def test_every_link_leads_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text("utf-8")):
        if target.startswith("http"):
            continue
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{target}#{anchor}"
