"""accelerate: its save snippet, offloading, dispatch, mixed precision; DDP and FSDP2 over gloo."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from product import IDS, greedy, llama2, tiny_config, tiny_model


def _same(model: Any) -> None:
    want = tiny_model(torch.float32)
    torch.testing.assert_close(model.eval()(IDS).logits, want(IDS).logits)
    assert torch.equal(greedy(model), greedy(want))


def case_save_snippet(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny_model(torch.float32))
    accelerator.unwrap_model(model).save_pretrained(
        folder,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    _same(llama2.AutoModelForCausalLM.from_pretrained(folder))
    accelerator.save_model(model, folder / "model")
    accelerator.save_state(folder / "state")
    accelerator.load_state(folder / "state")


def case_cpu_offload(folder: Path) -> None:
    _same(cpu_offload(tiny_model(torch.float32), execution_device=torch.device("cpu")))


def case_disk_offload(folder: Path) -> None:
    _same(disk_offload(tiny_model(torch.float32), str(folder), execution_device=torch.device("cpu")))


def case_dispatch(folder: Path) -> None:
    model = tiny_model(torch.float32)
    places = infer_auto_device_map(model, max_memory={"cpu": 10**9}, no_split_module_classes=model._no_split_modules)
    _same(dispatch_model(model, places))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = tiny_model(torch.float32)
    _same(dispatch_model(model, places, offload_dir=str(folder), main_device="cpu", force_hooks=True))


def case_empty_weights(folder: Path) -> None:
    tiny_model(torch.float32).save_pretrained(folder)
    with init_empty_weights():
        model = llama2.LlamaForCausalLM(tiny_config())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    _same(load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"}))


def case_accumulated_steps(folder: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_model(torch.float32).train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
    losses = []
    for _ in range(6):
        with accelerator.accumulate(model):
            loss = model(IDS, labels=IDS).loss
            losses.append(float(loss))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert losses[1] == losses[0] and losses[-1] < 0.97 * losses[0]


def case_outputs_are_converted(folder: Path) -> None:
    """What mixed precision does to the outputs of forward: float32, and still our class."""
    from accelerate.utils import convert_outputs_to_fp32

    model = tiny_model(torch.bfloat16)
    out = convert_outputs_to_fp32(model.forward)(IDS, labels=IDS)
    assert type(out).__name__ == "CausalLMOutputWithPast" and out.logits.dtype == torch.float32 and out.loss is out[0]


def _ranks(rank: int, port: int, kind: str, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = tiny_model(torch.float32).train()
    wrapped: Any = model
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        model.gradient_checkpointing_enable()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss = wrapped(IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss
    loss.backward()
    gradients = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    if rank == 0:
        torch.save(gradients, out)
    dist.destroy_process_group()


def _over_ranks(kind: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_ranks, (port, kind, str(folder / "gradients.pt")), nprocs=2)
    model = tiny_model(torch.float32).train()
    sum(0.5 * model(IDS[i : i + 1], labels=IDS[i : i + 1]).loss for i in range(2)).backward()  # type: ignore[union-attr]
    found = torch.load(folder / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name, rtol=1e-3, atol=1e-5)


def case_ddp(folder: Path) -> None:
    _over_ranks("ddp", folder)


def case_fsdp2(folder: Path) -> None:
    _over_ranks("fsdp2", folder)
