"""The memory in Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradproj import GradientProjectionMemory, InputError
from tests.gradproj.integrations.small import assert_kept, assert_open, outputs

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from gradproj.integrations.huggingface import MEMORY, GradientProjectionCallback  # noqa: E402

# Older and newer names of one thing; peft uses the older.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated and will be removed in v6")
LENGTH, PADDING = 8, 16


def texts(seed: int, n: int = 16) -> list[dict[str, Tensor]]:
    """Token sequences of different lengths, padded to one; those of a task have tokens of their own."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(4, LENGTH + 1, (n,), generator=random):
        tokens = torch.randint(8 * seed, 8 * seed + 8, (LENGTH,), generator=random)
        attention_mask = (torch.arange(LENGTH) < length).long()
        labels = torch.where(attention_mask.bool(), tokens, -100)
        tokens = torch.where(attention_mask.bool(), tokens, PADDING)
        rows.append({"input_ids": tokens, "attention_mask": attention_mask, "labels": labels})
    return rows


OLD = {key: torch.stack([row[key] for row in texts(0)]) for key in ("input_ids", "attention_mask")}


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": PADDING + 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LENGTH}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def with_lora() -> peft.PeftModel:
    lora = peft.LoraConfig(r=32, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), lora)


def with_checkpointing() -> transformers.LlamaForCausalLM:
    model = llama()
    model.gradient_checkpointing_enable()
    return model


class Losses(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs["loss"]] if "loss" in logs else []

    def assert_falling(self) -> None:
        assert sum(self.values[-3:]) < 0.95 * sum(self.values[:3])


def trainer(model: Any, folder: Path, seed: int, *callbacks: Any, **arguments: Any) -> transformers.Trainer:
    settings = {
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1},
        **{"learning_rate": 0.01, "weight_decay": 0.1, "num_train_epochs": 3, "per_device_train_batch_size": 4},
        **{"dataloader_pin_memory": False, **arguments},
    }
    arguments = transformers.TrainingArguments(str(folder), **settings)
    done = transformers.Trainer(model, arguments, train_dataset=texts(seed), callbacks=list(callbacks))
    done.remove_callback(transformers.PrinterCallback)
    return done


def first_task(model: Any, folder: Path, **arguments: Any) -> GradientProjectionMemory:
    memory = GradientProjectionMemory(model)
    trainer(model, folder, 0, GradientProjectionCallback(memory, 1.0, samples=[OLD]), **arguments).train()
    return memory


def on_counted(model: Any) -> Any:
    return lambda batch: model(**batch).logits[OLD["attention_mask"].bool()]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (llama, {}),
        (with_lora, {"num_train_epochs": 6}),
        (with_checkpointing, {"gradient_accumulation_steps": 2, "num_train_epochs": 6}),
    ],
    ids=["AdamW", "LoRA", "accumulation and checkpointing"],
)
def test_old_outputs_stay_while_the_new_task_is_learned(make, arguments, tmp_path):
    model = make()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    memory = first_task(model, tmp_path, **arguments)
    run, losses = on_counted(model), Losses()
    old = outputs(run, model, OLD)
    new = trainer(model, tmp_path, 1, GradientProjectionCallback(memory, 1.0, remember=False), losses, **arguments)
    new.train()
    losses.assert_falling()
    assert_kept(memory, run, old, OLD)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_samples_are_drawn_of_the_tasks_own_data_without_padding(tmp_path):
    model = llama()
    memory = GradientProjectionMemory(model)
    trainer(model, tmp_path, 0, GradientProjectionCallback(memory, 1.0)).train()
    looked_up = OLD["input_ids"][OLD["attention_mask"].bool()].unique()
    assert torch.equal(memory.bases["model.embed_tokens"], looked_up)
    run = on_counted(model)
    old = outputs(run, model, OLD)
    trainer(model, tmp_path, 1, GradientProjectionCallback(memory, 1.0)).train()
    assert memory.n_updates == 2
    assert (outputs(run, model, OLD) - old).norm() <= 1e-5 * old.norm()
    everything = GradientProjectionMemory(model)
    everything.update(model, texts_as_batch(0), 1.0)
    assert PADDING in everything.bases["model.embed_tokens"]


def texts_as_batch(seed: int) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in texts(seed)]) for key in ("input_ids", "labels")}


def test_mixed_precision(tmp_path):
    model = llama()
    memory = first_task(model, tmp_path, bf16=True)
    run, losses = on_counted(model), Losses()
    old = outputs(run, model, OLD)
    callback = GradientProjectionCallback(memory, 1.0, remember=False)
    trainer(model, tmp_path, 1, callback, losses, bf16=True).train()
    losses.assert_falling()
    assert memory.verify(run, OLD).holds
    assert (outputs(run, model, OLD) - old).norm() <= 3 * torch.finfo(torch.bfloat16).eps * old.norm()


class Fails(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyError("broken step")


def test_after_an_exception_the_memory_stops_or_the_next_training_stops_it(tmp_path):
    model = llama()
    memory = first_task(model, tmp_path)
    run = on_counted(model)
    old = outputs(run, model, OLD)
    for _ in range(2):
        with pytest.raises(KeyError, match="broken step"):
            trainer(model, tmp_path, 1, GradientProjectionCallback(memory, 1.0), Fails()).train()
        assert memory.is_protecting and memory.n_updates == 1
    memory.stop()
    assert_open(model)
    trainer(model, tmp_path, 1, GradientProjectionCallback(memory, 1.0, remember=False)).train()
    assert_open(model)
    assert_kept(memory, run, old, OLD)


class TestCheckpoints:
    def interrupted(self, folder: Path) -> tuple[GradientProjectionMemory, Tensor]:
        """The memory of a first task, and its outputs, of which a checkpoint is left in the second task's middle."""
        model = llama()
        memory = first_task(model, folder)
        old = outputs(on_counted(model), model, OLD)
        callback = GradientProjectionCallback(memory, 1.0)
        trainer(model, folder, 1, callback, save_strategy="steps", save_steps=5).train()
        return memory, old

    def test_a_second_task_goes_on_protected(self, tmp_path):
        memory, old = self.interrupted(tmp_path)
        assert memory.n_updates == 2
        model = llama()
        again = GradientProjectionMemory(model)
        callback = GradientProjectionCallback(again, 1.0, remember=False)
        trainer(model, tmp_path, 1, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert again.n_updates == 1
        assert_kept(again, on_counted(model), old, OLD)

    def test_without_its_memory_it_does_not_go_on(self, tmp_path):
        self.interrupted(tmp_path)
        (tmp_path / "checkpoint-5" / MEMORY).unlink()
        model = llama()
        callback = GradientProjectionCallback(GradientProjectionMemory(model), 1.0)
        with pytest.raises(InputError, match="training resumes without a memory"):
            trainer(model, tmp_path, 1, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_model_that_the_trainer_makes_anew_is_said(tmp_path):
    memory = GradientProjectionMemory(llama())
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    callback = GradientProjectionCallback(memory, 1.0)
    anew = transformers.Trainer(model_init=llama, args=arguments, train_dataset=texts(0), callbacks=[callback])
    with pytest.raises(InputError, match="another model"):
        anew.train()
