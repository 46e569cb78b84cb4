"""`llama2 align TASK`: a policy made better by rewards: rejection sampling, PPO, GRPO, RLOO."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from llama2.cli import terminal
from llama2.cli.align_options import (
    DistilOptions,
    GhostOptions,
    GrpoOptions,
    MeasureOptions,
    PolicyOptions,
    PpoOptions,
    RejectionOptions,
    RlooOptions,
    SynthesisOptions,
)
from llama2.cli.finetune import before_torch
from llama2.cli.progress import StepMeter
from llama2.cli.recipes import set_values
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.align.configs import PolicyConfig
    from llama2.align.rehearsal import SamplingRehearsal
    from llama2.align.synthesis import Synthesis
    from llama2.train.recipe import TrainingResult
    from llama2.train.rehearsal import Rehearsal

Options = RejectionOptions | PolicyOptions | GhostOptions | DistilOptions | MeasureOptions
# One row a task: its flags, what --help says, and what runs it.
_ROWS: dict[str, tuple[type[Any], str, str]] = {
    "rejection": (RejectionOptions, "K answers to each prompt; the best become rows to tune on", "_reject"),
    "ghost": (GhostOptions, "dialogues that obey their first turn, as rows to tune on", "_synthesise"),
    "distil": (DistilOptions, "safer answers under a pre-prompt, as rows to tune on", "_synthesise"),
    "measure": (MeasureOptions, "rewards, wins and KL of a policy on held-out prompts", "_synthesise"),
    "ppo": (PpoOptions, "the paper's policy optimisation, with a critic", "_optimize"),
    "grpo": (GrpoOptions, "several answers to a prompt beside each other, without a critic", "_optimize"),
    "rloo": (RlooOptions, "the same, measured by the other answers' mean", "_optimize"),
}
TASKS: dict[str, type[Any]] = {name: row[0] for name, row in _ROWS.items()}
SUMMARY = {name: row[1] for name, row in _ROWS.items()}


def words(arguments: Sequence[str]) -> list[str]:
    """The words of the command line."""
    return list(arguments)


def run(options: Options) -> int:
    """Runs the command."""
    before_torch()
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


def _rehearsed(found: "Rehearsal | SamplingRehearsal", first: bool, as_json: bool) -> int:
    """Tells what a run will take."""
    from llama2.train.distributed import shutdown

    if first:
        print(json.dumps(asdict(found)) if as_json else "\n".join(found.lines()))
    shutdown()
    return 0


def _prompt_meter(options: "RejectionOptions | SynthesisOptions") -> Callable[[int, int], None]:
    """Tells how many prompts are done."""

    def report(done: int, of: int) -> None:
        if not options.quiet:
            terminal.notice(f"{done:,} of {of:,} prompts")

    return report


# -- rejection sampling ------------------------------------------------------------------------------------------


def _reject(options: RejectionOptions) -> int:
    from llama2.align.rehearsal import rehearse_sampling
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
    if options.dry_run:
        return _rehearsed(rehearse_sampling(job), job.ranks.first, options.json)
    outcome = job.run(_prompt_meter(options))
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


def _synthesise(options: GhostOptions | DistilOptions | MeasureOptions) -> int:
    from llama2.align.rehearsal import rehearse_sampling
    from llama2.train.distributed import shutdown

    job = _synthesis(options)
    if options.dry_run:
        return _rehearsed(rehearse_sampling(job), job.ranks.first, options.json)
    outcome = job.run(_prompt_meter(options))
    folder = options.paths[2]
    if job.ranks.first and options.json:
        print(json.dumps({"folder": folder, "rows": outcome.rows, **outcome.values}))
    elif job.ranks.first:
        print("\n".join(outcome.texts))
        told = f"{folder} holds rows.jsonl, samples.jsonl and report.json"
        if not (isinstance(options, MeasureOptions) or getattr(options, "measure", False)):
            again = shlex.join(["llama2", "finetune", "sft", options.paths[0], f"{folder}/rows.jsonl", f"{folder}-sft"])
            told += f"; tune on the rows with\n  {again}"
        print(told)
    shutdown()
    return 0


def _synthesis(options: GhostOptions | DistilOptions | MeasureOptions) -> "Synthesis":
    """The job that flags describe."""
    from llama2.align.distil import Distillation, DistilPlan
    from llama2.align.ghost import Ghost, GhostPlan
    from llama2.align.measure import Measurement, MeasurePlan

    policy, prompts, folder = _paths(options)
    apart = ("resume", "quiet", "json", "columns", "dry_run")
    settings = {f.name: getattr(options, f.name) for f in fields(SynthesisOptions) if f.name not in apart}
    settings |= {"policy": policy, "prompts": prompts, "output_dir": folder, "count": options.k,
                 "columns": _columns(options.columns)}  # fmt: skip

    def own(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    if isinstance(options, MeasureOptions):
        return Measurement(MeasurePlan(**settings, rewards=options.reward, **own("against", "chat")), options.resume)
    if isinstance(options, GhostOptions):
        settings["count"] = options.k or (1 if options.measure else 4)
        more = own("turns", "combine", "plain", "instructions", "reward", "max_length", "measure")
        return Ghost(GhostPlan(**settings, **more), options.resume)
    if options.safety_reward is None:
        raise InputError("align distil needs --safety-reward: a reward model, module:function, or an URL")
    more = own("margin", "loss", "templates", "reward")
    return Distillation(DistilPlan(**settings, **more, safety=options.safety_reward), options.resume)


# -- policy optimisation -----------------------------------------------------------------------------------------


def _optimize(options: PolicyOptions) -> int:
    from llama2.align.job import Alignment, AlignmentGoal
    from llama2.align.rehearsal import rehearse_policy
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
        eval_split=options.eval_split, samples_every=options.samples_every * options.mini_batches * options.passes,
    )  # fmt: skip
    job = Alignment(goal, recipe, configuration(options, adapted), None if options.quiet else terminal.notice)
    if options.dry_run:
        return _rehearsed(rehearse_policy(job), job.ranks.first, options.json)
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
