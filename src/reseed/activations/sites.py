"""Sites of a transformer block: what attention and MLP add to the residual stream.

Blocks differ between families: a norm or a factor may follow a sublayer, the sublayer may add the
residual itself, attention and MLP may run in parallel. The sites are therefore found in the
computation, not by names. `find_sites` records one forward pass through a block and follows the
additions that lead from the block's input to its output. The terms of this sum are what the
sublayers add. `check_sums` verifies this with the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from reseed.activations.places import INPUT, SUM, TERM, Place, one_pass, read, watch
from reseed.activations.recorder import BlockDone, Recorder, Value, WithoutValues
from reseed.errors import ConfigError

ATTENTION, MLP = "attention", "MLP"
SUBLAYER_SITES = ("attn_out", "mlp_out", "resid_mid", "attn_z")
ULPS = 4
"""Units in the last place by which a sum of three terms may differ, as its order is not known."""


@dataclass(frozen=True)
class Sites:
    """The sites of a block.

    Attributes:
        places: site → place, for the sites that the block has.
        reasons: site → reason, for the others.
        sums: sites that add up to the last one of the tuple.
    """

    places: dict[str, Place]
    reasons: Mapping[str, str]
    sums: Sequence[tuple[str, ...]] = ()

    def place(self, site: str) -> Place:
        """Return the place of a site.

        Raises:
            LookupError: the block has no such site; the message is the reason.
        """
        if site in self.reasons:
            raise LookupError(self.reasons[site])
        return self.places[site]


def find_sites(model: nn.Module, block: str, tokens: Tensor) -> Sites:
    """Find the sites of a block in one forward pass, which ends after it.

    Args:
        model: a causal language model, with its weights or on the meta device.
        block: path of the block.
        tokens: [sequences, context], on the model's device.
    """
    recorder = Recorder(model, block)
    try:
        with one_pass(model), WithoutValues(), recorder:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except BlockDone:
        pass
    return _sites(recorder)


@dataclass(frozen=True)
class _Term:
    """A term that an addition adds to the stream.

    Attributes:
        value: the term.
        addition: the result of the addition, which may lie inside a term that sublayers share.
        index: the term's index in the addition.
        step: number of the addition on the way from the block's input to its output.
        sources: the sublayers that it was computed by.
    """

    value: Value
    addition: Value
    index: int
    step: int
    sources: frozenset[str]


class _Sum:
    """The sum that leads from a block's input to its output.

    Raises:
        LookupError: the output is no such sum.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.block = recorder, recorder.block
        self.modules = dict(recorder.model.named_modules())
        self.start = recorder.inputs[self.block][0]
        chain = self._chain(recorder.outputs[self.block][0])
        self.steps = [addition for addition, _ in chain]
        self.stream = {self.start, *self.steps}
        self.terms: list[_Term] = []
        for step, (addition, index) in enumerate(chain):
            self.terms += self._split(addition, index, step)

    def _chain(self, output: Value) -> list[tuple[Value, int]]:
        """Return the additions from the input to the output, with the index of the added term."""
        carries: dict[Value, bool] = {self.start: True}

        def carried(value: Value) -> bool:
            if value not in carries:
                carries[value] = value.addition is not None and any(map(carried, value.parents))
            return carries[value]

        chain: list[tuple[Value, int]] = []
        while output is not self.start:
            there = [carried(parent) for parent in output.parents] if carried(output) else []
            if there.count(True) != 1:
                raise LookupError("the block's output is not its input plus what sublayers add")
            chain.insert(0, (output, there.index(False)))
            output = output.parents[there.index(True)]
        return chain

    def _split(self, addition: Value, index: int, step: int) -> list[_Term]:
        """Return the term, or its own terms if they come from different sublayers."""
        value = addition.parents[index]
        sources = self._sources(value, set())
        if len(sources) > 1 and value.addition is not None:
            return [*self._split(value, 0, step), *self._split(value, 1, step)]
        return [_Term(value, addition, index, step, sources)]

    def _sources(self, value: Value, seen: set[Value]) -> frozenset[str]:
        """Return the names of the sublayers that computed a value."""
        if value in seen or value in self.stream:
            return frozenset()
        seen.add(value)
        sublayer = self._sublayer(value.module)
        if sublayer:
            return frozenset([sublayer])
        return frozenset().union(*(self._sources(parent, seen) for parent in value.parents))

    def _sublayer(self, module: str) -> str:
        """Return the sublayer that a module belongs to: `ATTENTION`, `MLP`, another name, or ""
        for the block's own code and for norms, which may belong to any."""
        path, kind = self.block, ""
        for name in module[len(self.block) + 1 :].split("."):
            path += f".{name}"
            kind = type(self.modules.get(path)).__name__
            if _NORM.search(name) or kind.endswith(("Norm", "Dropout")):
                return ""
            if _ATTENTION.search(name) or "Attention" in kind:
                return ATTENTION
            if _MLP.search(name) or "MLP" in kind:
                return MLP
        return module[len(self.block) + 1 :].partition(".")[0]

    def find(self, sublayer: str) -> _Term:
        """Return what a sublayer adds.

        Raises:
            LookupError: nothing, or not by itself.
        """
        found = [term for term in self.terms if term.sources == {sublayer}]
        if len(found) != 1:
            added = ", ".join(sorted("+".join(sorted(t.sources)) or "?" for t in self.terms))
            raise LookupError(f"the block adds {added or 'nothing'} to the stream")
        return found[0]

    def alone(self, sublayer: str) -> _Term:
        """Return what a sublayer adds, if the streams around it differ by nothing else.

        Raises:
            LookupError: they do.
        """
        found = self.find(sublayer)
        between = [
            term
            for term in self.terms
            if self.middle is None or (term.step <= self.middle) == (found.step <= self.middle)
        ]
        pair = {frozenset([ATTENTION]), frozenset([MLP])} if self.middle is None else set()
        others = [t for t in between if t is not found and t.sources not in pair]
        if others:
            names = ", ".join(sorted("+".join(sorted(t.sources)) for t in others))
            raise LookupError(f"the block adds it together with {names}")
        return found

    @cached_property
    def middle(self) -> int | None:
        """The step after which the MLP reads the stream; None if that is the block's input."""
        try:
            mlp = self.find(MLP)
        except LookupError:
            return None
        read = set(_before(mlp.value))
        return max((i for i, s in enumerate(self.steps[:-1]) if s in read), default=None)

    def place(self, term: _Term) -> Place:
        """Return the place of a term: preferably the output of a module.

        Raises:
            LookupError: the code that adds it runs several times.
        """
        found = [
            name
            for name, values in self.recorder.outputs.items()
            if len(values) == 1 and values[0] is term.value and name != self.block
        ]
        if found:
            outermost = min(found, key=lambda name: name.count("."))
            return Place(outermost)
        self._check_once(term.addition)
        return Place(term.addition.module, TERM, term.addition.addition or 0, term.index)

    def middle_place(self) -> Place:
        """Return the place of the stream between attention and MLP.

        Raises:
            LookupError: there is no such stream.
        """
        if self.middle is None:
            raise LookupError("attention and MLP do not follow each other in the block")
        value = self.steps[self.middle]
        self._check_once(value)
        return Place(value.module, SUM, value.addition or 0)

    def _check_once(self, addition: Value) -> None:
        calls = len(self.recorder.outputs[addition.module])
        if calls != 1:
            raise LookupError(f"{addition.module}, which adds it to the stream, runs {calls} times")

    def projected(self) -> Place:
        """Return the input of the last projection on the way to what attention adds.

        Raises:
            LookupError: there is none.
        """
        matrices = {
            values[0]: name
            for name, values in self.recorder.outputs.items()
            if len(values) == 1
            and self._sublayer(name) == ATTENTION
            and getattr(getattr(self.modules[name], "weight", None), "ndim", 0) == 2
        }
        nearest = next((v for v in _before(self.find(ATTENTION).value) if v in matrices), None)
        if nearest is not None:
            (read,) = self.recorder.inputs[matrices[nearest]]
            if any(value in matrices for value in _before(read)):  # not queries, keys or values
                return Place(matrices[nearest], INPUT)
        raise LookupError("attention does not end in the projection of one tensor")


def _before(value: Value) -> Iterator[Value]:
    """Yield a value and those it was computed from, the nearest first."""
    waiting, seen = [value], {value}
    for found in waiting:
        yield found
        for parent in found.parents:
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)


_NORM = re.compile(r"norm|^ln|_ln|dropout", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert|^fc\d?$|^ff$", re.IGNORECASE)


def _sites(recorder: Recorder) -> Sites:
    """Name the tensors of a recorded block."""
    block = recorder.block
    places = {"resid_pre": Place(block, INPUT), "resid_post": Place(block)}
    try:
        found = _Sum(recorder)
    except LookupError as error:
        return Sites(places, dict.fromkeys(SUBLAYER_SITES, str(error)))
    reasons: dict[str, str] = {}
    for site, find in (
        ("attn_out", lambda: found.place(found.alone(ATTENTION))),
        ("mlp_out", lambda: found.place(found.alone(MLP))),
        ("resid_mid", found.middle_place),
        ("attn_z", found.projected),
    ):
        try:
            places[site] = find()
        except LookupError as error:
            reasons[site] = str(error)
    outs = [site for site in ("attn_out", "mlp_out") if site in places]
    sums: list[tuple[str, ...]] = []
    if "resid_mid" in places:
        around = {"attn_out": ("resid_pre", "resid_mid"), "mlp_out": ("resid_mid", "resid_post")}
        sums += [(around[site][0], site, around[site][1]) for site in outs]
    elif outs:
        sums.append(("resid_pre", *outs, "resid_post"))
    return Sites(places, reasons, sums)


def check_sites(model: nn.Module, sites: Sites, tokens: Tensor) -> dict[str, str]:
    """Check the sites of a block with the weights, in the model's own dtype.

    Returns:
        site → reason, for the sites that are wrong. A sum of two terms must be equal bit for bit,
        one of three up to `ULPS` units in the last place of its largest term. ``attn_z`` must
        depend on other positions of the stream.
    """
    wrong = _check_sums(model, sites, tokens)
    if "attn_z" in sites.places:
        place, start = sites.places["attn_z"], sites.places["resid_pre"]
        before = read(model, [place], input_ids=tokens)[place]
        with watch(model, {start: _moved_before_the_end}):
            after = read(model, [place], input_ids=tokens)[place]
        if torch.equal(before[:, -1], after[:, -1]):
            wrong["attn_z"] = f"{place} does not depend on other positions"
    return wrong


def _moved_before_the_end(x: Tensor) -> Tensor:
    """Return activations [sequences, context, width] that differ but for the last position."""
    moved = x.clone()
    moved[:, :-1] += torch.linspace(-1, 1, x.shape[-1], device=x.device).to(x.dtype)
    return moved


def _check_sums(model: nn.Module, sites: Sites, tokens: Tensor) -> dict[str, str]:
    wrong: dict[str, str] = {}
    wanted = {sites.places[site]: site for names in sites.sums for site in names}
    found = {
        wanted[place]: tensor
        for place, tensor in read(model, list(wanted), input_ids=tokens).items()
    }
    for *names, total in sites.sums:
        terms = [found[name] for name in names]
        added, there = sum(terms[1:], terms[0]), found[total]
        if len(terms) == 2:
            allowed = torch.zeros_like(there, dtype=torch.float64)
        else:
            largest = torch.stack([x.abs().double() for x in (*terms, there)]).amax(0)
            allowed = ULPS * torch.finfo(there.dtype).eps * 2.0 ** torch.floor(torch.log2(largest))
        error = (added.double() - there.double()).abs()
        if not bool((error <= allowed).all()):
            rule = f"{' + '.join(names)} must be {total}"
            told = f"{rule}, and differs by up to {float(error.max()):.2g}"
            wrong |= {name: told for name in names if name in SUBLAYER_SITES}
    return wrong


def blocks_path(model: nn.Module) -> str:
    """Return the path of the blocks: the outermost ModuleList with one entry per layer."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ConfigError(
            "{key}: cannot find the model's blocks; name the module with hookpoint=module "
            "hookpoint.module=...",
            "hookpoint.site",
        )
    depth = min(name.count(".") for name in lists)
    outermost = [name for name in lists if name.count(".") == depth]
    if len(outermost) > 1:
        raise ConfigError(
            f"{{key}}: cannot tell which modules are the model's blocks: {', '.join(outermost)}; "
            "name the module with hookpoint=module hookpoint.module=...",
            "hookpoint.site",
        )
    return outermost[0]
