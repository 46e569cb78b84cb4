"""The flags that choose the next token, and the GenerationConfig they make. No torch."""

from dataclasses import dataclass

from llama2.cli.args import option
from llama2.errors import InputError
from llama2.generation.call_settings import FILTERS, choosing
from llama2.generation.config import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """how the next token is chosen; what is not given comes from the checkpoint's generation_config.json."""

    max_new_tokens: int = option(512, "most tokens of one answer; the context may end it earlier", alias="-n")
    temperature: float | None = option(None, "spread of the random choice; 0 takes the most likely token every time")
    top_p: float | None = option(None, "choose among the most likely tokens that together have this probability")
    top_k: int | None = option(None, "choose among this many most likely tokens; 0 is no limit")
    min_p: float | None = option(None, "drop tokens less likely than this share of the likeliest one")
    repetition_penalty: float | None = option(None, "above 1 makes tokens less likely that are in the text already")
    greedy: bool = option(False, "take the most likely token every time: the same answer every time")
    seed: int | None = option(None, "makes the random choice repeatable")
    stop: tuple[str, ...] = option((), "end the answer behind this text; may be given several times")

    def settings(self) -> GenerationConfig:
        """The settings that were given. Raises InputError for values that cannot work."""
        self._check()
        given = {
            name: getattr(self, name)
            for name in ("max_new_tokens", *FILTERS, "repetition_penalty")
            if getattr(self, name) is not None
        }
        if self.greedy:
            given["do_sample"] = False
        given = choosing(given)
        if self.stop:
            given["stop_strings"] = list(self.stop)
        return GenerationConfig(**given)

    def _check(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"--temperature is {self.temperature}; it must be at least 0, where 0 takes the most likely token "
                "every time and 0.7 is a usual value"
            )
        idle = [f"--{name.replace('_', '-')}" for name in FILTERS if getattr(self, name)]
        if idle and (self.greedy or self.temperature == 0):
            reason = "--greedy" if self.greedy else "--temperature 0"
            raise InputError(f"{reason} takes the most likely token, so {', '.join(idle)} would do nothing; drop one")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}; it must be between 0 and {2**63 - 1}")
        if "" in self.stop:
            raise InputError("--stop is empty text, which every answer contains; give the text to stop at")
