"""`llama2 align TASK`: a policy made better by rewards: rejection sampling, PPO, GRPO, RLOO."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llama2.cli import terminal
from llama2.cli.args import option, revision_option
from llama2.cli.finetune import AdapterOptions, bound_caches
from llama2.cli.progress import StepMeter
from llama2.cli.recipes import set_values
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.align.configs import PolicyConfig
    from llama2.train.recipe import TrainingResult


@dataclass(frozen=True, kw_only=True)
class Judging:
    """rewards and prompts."""

    reward: tuple[str, ...] = option((), "a reward model (a folder or hub id), module:function, or the URL of a "
                                     "server; several are added", metavar="REWARD")  # fmt: skip
    safety_reward: str | None = option(None, "a second one, which takes the place of the rest where the prompt is "
                                       "tagged (its column safety) or the answer unsafe", metavar="REWARD")  # fmt: skip
    safety_threshold: float = option(0.15, "probability of being safe below which an answer is unsafe")
    top_p: float = option(1.0, "of the likeliest tokens, those that make up this share")
    max_new_tokens: int = option(256, "tokens of an answer, at most")
    max_prompt_length: int | None = option(None, "leave out rows with a longer prompt (default: they are an error)")
    chat: bool = option(False, "prompts that are texts are what a user says, in the chat template")
    columns: str | None = option(None, "columns that are called otherwise in PROMPTS: prompt=question",
                                 metavar="NAME=COLUMN,...")  # fmt: skip
    revision: str | None = revision_option("POLICY")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one", metavar="DEVICE")
    seed: int = option(42, "of the answers, of the order of prompts and of fresh weights")
    resume: bool = option(False, "go on where the run in the folder has ended")
    quiet: bool = option(False, "no progress, no report of the rows")
    json: bool = option(False, "the result as JSON")


_PATHS: tuple[str, ...] = option((), "the model that answers (a folder, a file, a hub id or an adapter), rows with "
                                 'prompts ({"prompt"} or {"messages"}), the new folder',
                                 metavar="POLICY PROMPTS OUT", positional=True)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RejectionOptions(Judging):
    """Rejection sampling: K answers to each prompt, of which the best become rows for `llama2 finetune sft`, with all
    scores, seeds and a picture of the best-of-N reward. Tune from the base model, on the rows of all rounds."""

    name: ClassVar[str] = "rejection"

    paths: tuple[str, ...] = _PATHS
    k: int = option(8, "answers of each prompt", alias="-k")
    temperature: str = option("1.0", "of sampling; several, with commas, are compared on --sweep-prompts prompts, and "
                              "the one with the best best-of-K is taken", metavar="T[,T...]")  # fmt: skip
    sweep_prompts: int = option(50, "prompts that temperatures are compared on")
    pool: tuple[str, ...] = option((), "the folder of an earlier round, whose best rows are scored anew and kept where "
                                   "they are better; may be repeated", metavar="FOLDER")  # fmt: skip
    drop_equal: bool = option(False, "leave out prompts all of whose answers are worth the same")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "number format of the policy")


@dataclass(frozen=True, kw_only=True)
class Optimizing:
    """training."""

    iterations: int | None = option(None, "times that answers are sampled and learnt from (default: once each prompt)")
    prompts: int = option(64, "prompts of an iteration")
    mini_batches: int = option(1, "steps that the answers of an iteration are dealt to")
    passes: int = option(1, "times that each answer is learnt from")
    batch_size: int = option(8, "answers at once, which changes memory alone")
    temperature: float = option(1.0, "of sampling, and of all log-probabilities")
    learning_rate: float | None = option(None, "the peak (default: 1e-5 for an adapter, 1e-6 for all weights)")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option("constant", "how it falls")
    warmup_ratio: float = option(0.0, "share of the steps in which the rate rises")
    weight_decay: float = option(0.1, "of matrices, each step")
    max_grad_norm: float = option(1.0, "gradients beyond this norm are scaled down, 0: never")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the weights; auto is float32, and beneath an adapter what they are stored in, or on a CPU what it "
        "computes fast")  # fmt: skip
    bf16: bool = option(False, "compute in bfloat16; weights that are trained keep float32 copies")
    optim: Literal["adamw_torch", "adamw_8bit"] = option("adamw_torch", "adamw_8bit keeps its moments in bytes")
    mask_truncated: bool = option(False, "learn nothing from answers that reach their longest length")
    set: tuple[str, ...] = option((), "any other field of the method's configuration (PPOConfig, GRPOConfig, "
                                  "RLOOConfig); may be repeated", metavar="NAME=VALUE")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Watching:
    """measuring and saving."""

    eval_data: str | None = option(None, "prompts to measure on, as PROMPTS", metavar="PROMPTS")
    eval_split: float | None = option(None, "hold out this share of the prompts to measure on")
    eval_every: int = option(10, "measure every N iterations, and before and after")
    early_stop: int | None = option(None, "end after N measurements without a better held-out reward")
    save_every: int = option(10, "a checkpoint every N iterations")
    keep: int = option(2, "checkpoints at a time")
    log_every: int = option(1, "a line of log.jsonl every N iterations")
    report_to: Literal["none", "all", "tensorboard", "wandb", "mlflow", "trackio"] = option("none", "besides log.jsonl")


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(AdapterOptions, Optimizing, Watching, Judging):
    """What the three methods share."""

    name: ClassVar[Literal["ppo", "grpo", "rloo"]]

    k: int = option(8, "answers of each prompt", alias="-k")
    paths: tuple[str, ...] = _PATHS


@dataclass(frozen=True, kw_only=True)
class PpoOptions(PolicyOptions):
    """Proximal policy optimisation as Llama 2 describes it: the gated reward, whitened, less the KL to the model that
    the run begins with; clipped steps; a critic. Its batch: --prompts 512 --mini-batches 8.

    An interrupted run goes on when the same command is given again with --resume."""

    name = "ppo"
    k: int = option(1, "answers of each prompt", alias="-k")
    kl_coef: float | None = option(
        None, "of the KL in the reward (default: 0.01, and 0.005 from 30 billion weights on)"
    )
    target_kl: float | None = option(None, "let the coefficient follow this KL of an answer, in nats")
    early_stop_kl: float | None = option(None, "end the run where an answer's KL is beyond this")
    clip: float = option(0.2, "how far a step may change a token's probability")
    critic: Literal["shared", "adapter", "model"] | None = option(
        None,
        "a head on the policy's own states, a second adapter, or a model (default: adapter beside one, else model)",
    )
    critic_warmup: int = option(0, "iterations in which the critic alone learns")
    vf_coef: float = option(0.1, "weight of the critic's loss")
    value_clip: float | None = option(None, "how far a step may change a value")
    lam: float = option(0.95, "of generalised advantage estimation")
    eos_penalty: float | None = option(None, "taken off the whitened score of an answer that does not end")
    no_whitening: bool = option(False, "scores as they are, not whitened over the iteration")


@dataclass(frozen=True, kw_only=True)
class GrpoOptions(PolicyOptions):
    """Group-relative policy optimisation: the rewards of several answers to a prompt beside each other, no critic."""

    name = "grpo"
    k: int = option(8, "answers of each prompt", alias="-k")
    beta: float = option(0.0, "of a KL loss to the model that the run begins with")
    clip: float = option(0.2, "how far a step may change a token's probability downwards")
    clip_high: float | None = option(None, "and upwards (default: as --clip; DAPO: 0.28)")
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo"] = option(
        "dapo", "the mean over tokens, over answers, over the longest length; or clipped weights"
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "standard deviation that advantages are divided by"
    )
    level: Literal["token", "sequence"] = option("token", "what a probability ratio is of; sequence is GSPO")


@dataclass(frozen=True, kw_only=True)
class RlooOptions(PolicyOptions):
    """REINFORCE with a leave-one-out baseline: an answer is measured by the mean reward of its prompt's others."""

    name = "rloo"
    k: int = option(4, "answers of each prompt", alias="-k")
    beta: float = option(0.05, "of the KL in the reward to the model that the run begins with")
    clip: float = option(0.2, "how far a step may change an answer's probability")
    normalize: bool = option(False, "advantages with mean 0 and standard deviation 1 over the iteration")


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """sampling."""

    temperature: float = option(0.7, "of sampling")
    top_p: float = option(1.0, "of the likeliest tokens, those that make up this share")
    max_new_tokens: int = option(256, "tokens of an answer, at most")
    columns: str | None = option(None, "columns that are called otherwise in PROMPTS: prompt=question",
                                 metavar="NAME=COLUMN,...")  # fmt: skip
    revision: str | None = revision_option("POLICY")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "number format of the policy")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one", metavar="DEVICE")
    seed: int = option(42, "of the answers and of what is drawn besides")
    resume: bool = option(False, "go on where the run in the folder has ended")
    quiet: bool = option(False, "no progress")
    json: bool = option(False, "the result as JSON")


@dataclass(frozen=True, kw_only=True)
class GhostOptions(SynthesisOptions):
    """Ghost Attention: dialogues that obey an instruction of their first turn, as rows for `llama2 finetune sft`. It is
    said on every turn while answers are sampled, and stands on the first one only in the rows; the last answer alone is
    learnt. PROMPTS holds dialogues ({"messages"}, of which the user's turns are used) or prompts."""

    name: ClassVar[str] = "ghost"

    paths: tuple[str, ...] = _PATHS
    k: int = option(4, "answers of each turn, of which one that obeys is kept", alias="-k")
    turns: int = option(4, "turns of a dialogue; a row with fewer is filled up with those of others")
    combine: int = option(2, "instructions at once, at most, of different categories")
    plain: float = option(0.0, "share of dialogues whose earlier answers do not know the instruction")
    instructions: str | None = option(None, "rows of {text, short, category, check} (default: hobbies, figures, "
                                      "languages and forms)", metavar="FILE")  # fmt: skip
    reward: str | None = option(None, "prefers among answers that no program tells apart", metavar="REWARD")
    max_length: int | None = option(None, "tokens of a row, at most; middle turns go (default: the model's context)")


@dataclass(frozen=True, kw_only=True)
class DistilOptions(SynthesisOptions):
    """Safety context distillation: each prompt is answered as it is and behind a pre-prompt; where the safety model
    prefers the second answer it becomes a row for `llama2 finetune sft`, without the pre-prompt. A row's column
    category (illegal, hateful, unqualified, or one of --templates) adds the template of that risk."""

    name: ClassVar[str] = "distil"

    paths: tuple[str, ...] = _PATHS
    safety_reward: str | None = option(None, "what scores safety: a reward model, module:function, or the URL of a "
                                       "server", metavar="REWARD")  # fmt: skip
    reward: str | None = option(None, "what scores helpfulness, which may fall by --loss", metavar="REWARD")
    margin: float = option(0.0, "deviations of the first answers' safety by which the second has to be better")
    loss: float = option(1.0, "deviations of helpfulness that the second answer may lose")
    k: int = option(1, "answers behind the pre-prompt, of which the safest is taken", alias="-k")
    templates: str | None = option(None, "rows of {category, text}", metavar="FILE")


Options = RejectionOptions | PolicyOptions | GhostOptions | DistilOptions
# One row a task: its flags, what --help says, and what runs it.
_ROWS: dict[str, tuple[type[Any], str, str]] = {
    "rejection": (RejectionOptions, "K answers to each prompt; the best become rows to tune on", "_reject"),
    "ghost": (GhostOptions, "dialogues that obey their first turn, as rows to tune on", "_synthesise"),
    "distil": (DistilOptions, "safer answers under a pre-prompt, as rows to tune on", "_synthesise"),
    "ppo": (PpoOptions, "the paper's policy optimisation, with a critic", "_optimize"),
    "grpo": (GrpoOptions, "several answers to a prompt beside each other, without a critic", "_optimize"),
    "rloo": (RlooOptions, "the same, measured by the other answers' mean", "_optimize"),
}
TASKS: dict[str, type[Any]] = {name: row[0] for name, row in _ROWS.items()}
SUMMARY = {name: row[1] for name, row in _ROWS.items()}


def words(given: Sequence[str]) -> list[str]:
    """The words of the command line."""
    return list(given)


def run(options: Options) -> int:
    """Runs the command."""
    bound_caches()
    runs: dict[str, Callable[[Any], int]] = {
        "_reject": _reject,
        "_optimize": _optimize,
        "_synthesise": _synthesise,
    }
    return runs[_ROWS[options.name][2]](options)


def _paths(options: Options) -> tuple[str, str, str]:
    if len(options.paths) != 3:
        raise InputError(
            f"align {options.name} needs a policy, prompts and a new folder, but {len(options.paths)} paths were "
            f"given: {', '.join(options.paths) or 'none'}"
        )
    policy, prompts, folder = options.paths
    return policy, prompts, folder


def _columns(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    if any(not (name.strip() and sign and column.strip()) for name, sign, column in pairs):
        raise InputError(f"--columns is {text!r}; give pairs such as prompt=question")
    return {name.strip(): column.strip() for name, _, column in pairs}


# -- rejection sampling ------------------------------------------------------------------------------------------


def _reject(options: RejectionOptions) -> int:
    from llama2.align.rejection import Rejection, Round, next_command
    from llama2.train.distributed import shutdown

    policy, prompts, folder = _paths(options)
    round = Round(
        policy=policy,
        prompts=prompts,
        output_dir=folder,
        rewards=options.reward,
        safety=options.safety_reward,
        count=options.k,
        temperatures=_numbers("--temperature", options.temperature),
        columns=_columns(options.columns),
        **{name: getattr(options, name) for name in ("safety_threshold", "sweep_prompts", "top_p", "max_new_tokens",
           "max_prompt_length", "pool", "drop_equal", "seed", "chat", "revision", "dtype", "device")},
    )  # fmt: skip
    job = Rejection(round, options.resume, None if options.quiet else terminal.notice)

    def report(done: int, of: int) -> None:
        if not options.quiet:
            terminal.notice(f"{done:,} of {of:,} prompts")

    outcome = job.run(report)
    if job.ranks.first and options.json:
        print(json.dumps({"folder": folder, **vars(outcome)}))
    elif job.ranks.first:
        print("\n".join(outcome.lines()))
        print(f"{folder} holds rows.jsonl, samples.jsonl and best-of-n.svg; tune the base model on the rows with\n  "
              f"{shlex.join(next_command(round))}")  # fmt: skip
    shutdown()
    return 0


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"{flag} is {text!r}; give a number, or several with commas") from error


# -- rows to tune on -----------------------------------------------------------------------------------------------


def _synthesise(options: GhostOptions | DistilOptions) -> int:
    from llama2.align.distil import Distillation, DistilPlan
    from llama2.align.ghost import Ghost, GhostPlan
    from llama2.train.distributed import shutdown

    policy, prompts, folder = _paths(options)
    settings = {f.name: getattr(options, f.name) for f in fields(SynthesisOptions)}
    resume, quiet, as_json = (settings.pop(name) for name in ("resume", "quiet", "json"))
    settings |= {"policy": policy, "prompts": prompts, "output_dir": folder, "count": options.k,
                 "columns": _columns(options.columns), "reward": options.reward}  # fmt: skip
    job: Ghost | Distillation
    if isinstance(options, GhostOptions):
        own = ("turns", "combine", "plain", "instructions", "max_length")
        job = Ghost(GhostPlan(**settings, **{name: getattr(options, name) for name in own}), resume)
    else:
        if options.safety_reward is None:
            raise InputError("align distil needs --safety-reward: a reward model, module:function, or an URL")
        chosen = {name: getattr(options, name) for name in ("margin", "loss", "templates")}
        job = Distillation(DistilPlan(**settings, **chosen, safety=options.safety_reward), resume)

    def report(done: int, of: int) -> None:
        if not quiet:
            terminal.notice(f"{done:,} of {of:,} prompts")

    outcome = job.run(report)
    if job.ranks.first and as_json:
        print(json.dumps({"folder": folder, "rows": outcome.rows, **outcome.values}))
    elif job.ranks.first:
        print("\n".join(outcome.texts))
        again = shlex.join(["llama2", "finetune", "sft", policy, f"{folder}/rows.jsonl", f"{folder}-sft"])
        print(f"{folder} holds rows.jsonl, samples.jsonl and report.json; tune on the rows with\n  {again}")
    shutdown()
    return 0


# -- policy optimisation -----------------------------------------------------------------------------------------


def _optimize(options: PolicyOptions) -> int:
    from llama2.align.job import Alignment, AlignmentGoal
    from llama2.train.distributed import shutdown
    from llama2.train.recipe import Recipe

    policy, prompts, folder = _paths(options)
    goal = AlignmentGoal(method=options.name, rewards=options.reward, safety=options.safety_reward, chat=options.chat,
                patience=options.early_stop)  # fmt: skip
    adapted = _adapted(options, policy)
    recipe = Recipe(
        task="sft", model=policy, data=prompts, output_dir=folder, revision=options.revision,
        lora=None if _continues(options, policy) and not options.describes else options.lora,
        load_in_4bit=options.load_in_4bit, load_in_8bit=options.load_in_8bit, merge=options.merge,
        dtype="bfloat16" if options.bf16 and options.dtype == "auto" and adapted else options.dtype,
        device=options.device, columns=_columns(options.columns), eval_data=options.eval_data,
        eval_split=options.eval_split,
    )  # fmt: skip
    job = Alignment(goal, recipe, configuration(options, adapted), None if options.quiet else terminal.notice)
    quiet = options.quiet or not job.ranks.first
    if quiet:
        result = job.run(None)
    else:
        with StepMeter(options.name, int(job.args.logging_steps)) as report:
            result = job.run(report)
    if job.ranks.first:
        _show(result, options)
    shutdown()
    return 0 if result.finished else 130


def _continues(options: PolicyOptions, policy: str) -> bool:
    from llama2.train.origin import adapter_of

    return adapter_of(policy, options.revision) is not None


def _adapted(options: PolicyOptions, policy: str) -> bool:
    return options.lora is not None or _continues(options, policy)


# Flag of a method -> field of its configuration, where the two are called differently.
_FIELDS = {
    "ppo": {"clip": "cliprange", "value_clip": "cliprange_value", "eos_penalty": "missing_eos_penalty"},
    "grpo": {"clip": "epsilon", "clip_high": "epsilon_high", "level": "importance_sampling_level"},
    "rloo": {"clip": "epsilon", "normalize": "normalize_advantages"},
}


def configuration(options: PolicyOptions, adapted: bool) -> "PolicyConfig":
    """How the flags say to train. Raises InputError where their numbers do not divide each other."""
    from llama2.align.job import CONFIGS
    from llama2.train.distributed import join

    kind, world = CONFIGS[options.name], join().world
    known = {f.name for f in fields(kind)}
    names = _FIELDS[options.name]
    settings = {names.get(f.name, f.name): getattr(options, f.name) for f in fields(options)}
    settings = {name: value for name, value in settings.items() if name in known and value is not None}
    steps = options.mini_batches * options.passes
    settings |= _shape(options, world)
    settings |= {
        "output_dir": options.paths[2],
        "learning_rate": options.learning_rate or (1e-5 if adapted else 1e-6),
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.warmup_ratio,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
        "num_generations": options.k,
        "max_completion_length": options.max_new_tokens,
        "mask_truncated_completions": options.mask_truncated,
        "max_steps": -1 if options.iterations is None else options.iterations * steps,
        "num_train_epochs": 1.0,
        "save_steps": options.save_every * steps,
        "save_total_limit": options.keep,
        "logging_steps": options.log_every * steps,
        "resume_from_checkpoint": options.resume,
        "bf16": options.bf16 and not adapted,
    }
    if options.eval_data is not None or options.eval_split is not None:
        settings |= {"eval_strategy": "steps", "eval_steps": options.eval_every * steps, "eval_on_start": True}
    if options.early_stop is not None:
        if "eval_strategy" not in settings:
            raise InputError("--early-stop needs prompts to measure on; give --eval-data or --eval-split")
        settings |= {"metric_for_best_model": "reward", "greater_is_better": True, "load_best_model_at_end": True,
                     "save_steps": settings["eval_steps"]}  # fmt: skip
    if isinstance(options, PpoOptions):
        settings |= {"whiten_scores": not options.no_whitening, "num_mini_batches": options.mini_batches,
                     "num_ppo_epochs": options.passes, "cliprange_value": options.value_clip}  # fmt: skip
        settings.setdefault("kl_coef", _beta(options))
    chosen = set_values(options.set, lambda name: name in known)
    return kind(**{**settings, **chosen})


def _shape(options: PolicyOptions, world: int) -> dict[str, int]:
    """Micro-batches and steps of an iteration, as configurations say it."""
    answers = options.prompts * options.k
    step, rest = divmod(answers, options.mini_batches)
    if rest or step % world:
        raise InputError(
            f"an iteration has {answers} answers (--prompts {options.prompts} x -k {options.k}), which "
            f"--mini-batches {options.mini_batches} on {world} processes do not divide; change one of them"
        )
    own = step // world
    size = next(n for n in range(min(options.batch_size, own), 0, -1) if own % n == 0)
    if options.name == "ppo":
        return {"per_device_train_batch_size": size, "gradient_accumulation_steps": answers // world // size}
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": own // size,
        "steps_per_generation": answers // world // size,
        "num_iterations": options.passes,
    }


def _beta(options: PolicyOptions) -> float:
    """The paper's coefficient, by the size of the policy."""
    from llama2.auto import load_config
    from llama2.checkpoint.source import revision_of

    config = load_config(options.paths[0], **revision_of(options.paths[0], options.revision))
    weights = 12 * config.num_hidden_layers * config.hidden_size**2
    return 0.005 if weights > 25e9 else 0.01


def _show(result: "TrainingResult", options: PolicyOptions) -> None:
    if not result.finished:
        again = ["llama2", *sys.argv[1:]]
        command = shlex.join(again if "--resume" in again else [*again, "--resume"])
        print(f"llama2: stopped at step {result.step} of {result.steps}, which is saved; go on with\n  {command}",
              file=sys.stderr)  # fmt: skip
        return
    if options.json:
        print(json.dumps({**vars(result), "folder": str(result.folder)}))
        return
    print(f"{result.steps} steps, {result.tokens:,} tokens; {result.seconds:.0f} s with loading and saving")
    for name in ("eval_reward", "eval_reward_error", "eval_objective/kl", "eval_completions/mean_length",
                 "eval_unsafe_ratio"):  # fmt: skip
        if name in result.before and name in result.after:
            said = name.removeprefix("eval_").replace("_", " ")
            print(f"held out, {said}: {result.before[name]:.4f} before, {result.after[name]:.4f} after")
    print(f"{result.folder} holds the result, log.jsonl and reward.svg")
