"""The flags of `llama2 align TASK`, one class a task."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from llama2.cli.args import option, revision_option
from llama2.cli.finetune import AdapterOptions


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
    dry_run: bool = option(False, "check the prompts, answer the first ones, and say the memory and hours of the job; "
                           "nothing is written")  # fmt: skip
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
    samples_every: int = option(
        0, "answer the first held-out prompts every N iterations, into samples.jsonl (0: never)"
    )
    log_completions: bool = option(False, "every answer with its rewards and advantage, into completions.jsonl")
    dry_run: bool = option(False, "check the prompts, run two iterations, and say the memory, hours and files of the "
                           "run; nothing is written")  # fmt: skip
    report_to: Literal["none", "all", "tensorboard", "wandb", "mlflow", "trackio"] = option("none", "besides log.jsonl")


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(AdapterOptions, Optimizing, Watching, Judging):
    """Options of all three methods."""

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
    dry_run: bool = option(False, "check the prompts, answer the first ones, and say the memory and hours of the job; "
                           "nothing is written")  # fmt: skip
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
    k: int | None = option(None, "answers of each turn, of which one that obeys is kept (default: 4)", alias="-k")
    turns: int = option(4, "turns of a dialogue; a row with fewer is filled up with those of others")
    combine: int = option(2, "instructions at once, at most, of different categories")
    plain: float = option(0.0, "share of dialogues whose earlier answers do not know the instruction")
    instructions: str | None = option(None, "rows of {text, short, category, check} (default: hobbies, figures, "
                                      "languages and forms)", metavar="FILE")  # fmt: skip
    reward: str | None = option(None, "prefers among answers that no program tells apart", metavar="REWARD")
    max_length: int | None = option(None, "tokens of a row, at most; middle turns go (default: the model's context)")
    measure: bool = option(False, "say the instruction on the first turn alone, and tell how many answers still obey "
                           "it in each turn; nothing to tune on comes of it")  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(SynthesisOptions):
    """Evaluate a policy on held-out prompts: answers are drawn and judged by each reward. With --against a model
    (the one that a run began with) how often its answers are beaten, and the KL to it. Nothing is trained."""

    name: ClassVar[str] = "measure"

    paths: tuple[str, ...] = _PATHS
    reward: tuple[str, ...] = option((), "a reward model (a folder or hub id), module:function, or the URL of a "
                                     "server; several are told one by one", metavar="REWARD")  # fmt: skip
    against: str | None = option(None, "a model whose answers to the same prompts are compared", metavar="MODEL")
    k: int = option(4, "answers of each prompt", alias="-k")
    temperature: float = option(1.0, "of sampling, and of the KL")
    chat: bool = option(False, "prompts that are texts are what a user says, in the chat template")
