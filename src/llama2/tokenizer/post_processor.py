"""Where special tokens go around one text or a pair: the post-processing template, as tokenizer.json writes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama2.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class TemplatePart:
    """Text A, text B, or (`kind` special) a run of special ids; `type_id` is its token type."""

    kind: Literal["A", "B", "special"]
    type_id: int = 0
    ids: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """The layout of a single text and of a pair."""

    single: tuple[TemplatePart, ...]
    pair: tuple[TemplatePart, ...]

    def added(self, pair: bool) -> int:
        """How many special ids the layout adds."""
        return sum(len(part.ids) for part in (self.pair if pair else self.single))

    def around(self) -> tuple[list[int], list[int]]:
        """Special ids before and after a single text."""
        at = next(i for i, part in enumerate(self.single) if part.kind == "A")
        before = [i for part in self.single[:at] for i in part.ids]
        return before, [i for part in self.single[at + 1 :] for i in part.ids]

    def to_json(self) -> dict[str, Any]:
        """A TemplateProcessing object of tokenizer.json."""
        specials: dict[str, Any] = {}
        for part in self.pair + self.single:
            if part.kind == "special":
                specials[part.name] = {"id": part.name, "ids": list(part.ids), "tokens": [part.name]}

        def layout(parts: tuple[TemplatePart, ...]) -> list[dict[str, Any]]:
            return [
                {"SpecialToken": {"id": part.name, "type_id": part.type_id}}
                if part.kind == "special"
                else {"Sequence": {"id": part.kind, "type_id": part.type_id}}
                for part in parts
            ]

        return {
            "type": "TemplateProcessing",
            "single": layout(self.single),
            "pair": layout(self.pair),
            "special_tokens": specials,
        }


BARE = Template((TemplatePart("A"),), (TemplatePart("A"), TemplatePart("B", 1)))


def llama_template(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> Template:
    """Llama's layout: BOS and EOS, where given as (token, id), around each text: the second of a pair has its own."""

    def one(kind: Literal["A", "B"], type_id: int) -> tuple[TemplatePart, ...]:
        head = (TemplatePart("special", type_id, (bos[1],), bos[0]),) if bos else ()
        tail = (TemplatePart("special", type_id, (eos[1],), eos[0]),) if eos else ()
        return (*head, TemplatePart(kind, type_id), *tail)

    return Template(one("A", 0), one("A", 0) + one("B", 1))


def template_from_json(processor: Mapping[str, Any] | None) -> Template | None:
    """The template in a post_processor of tokenizer.json; None where it adds no tokens. Other kinds are refused."""
    if processor is None or processor["type"] == "ByteLevel":
        return None
    if processor["type"] == "Sequence":
        found = [template_from_json(p) for p in processor["processors"]]
        templates = [t for t in found if t is not None]
        if len(templates) > 1:
            raise TokenizerError("tokenizer.json has more than one TemplateProcessing; keep one")
        return templates[0] if templates else None
    if processor["type"] != "TemplateProcessing":
        raise TokenizerError(
            f"tokenizer.json post-processor {processor['type']!r} is not one of a Llama tokenizer; "
            "it must be TemplateProcessing, ByteLevel or a Sequence of these"
        )
    specials = processor["special_tokens"]

    def layout(items: list[dict[str, Any]]) -> tuple[TemplatePart, ...]:
        parts = []
        for item in items:
            if "Sequence" in item:
                parts.append(TemplatePart(item["Sequence"]["id"], item["Sequence"]["type_id"]))
            else:
                name = item["SpecialToken"]["id"]
                ids = tuple(specials[name]["ids"])
                parts.append(TemplatePart("special", item["SpecialToken"]["type_id"], ids, name))
        return tuple(parts)

    return Template(layout(processor["single"]), layout(processor["pair"]))


def ends_of(template: Template | None) -> tuple[bool, bool]:
    """Whether a single text gets special tokens in front and behind: what add_bos_token and add_eos_token read."""
    before, after = template.around() if template else ([], [])
    return bool(before), bool(after)
