"""A small Llama learns two texts with LoRA under Hugging Face's Trainer: python examples/language_model.py

Its weights are random, its tokens bytes, its texts this project's licence and README: nothing is downloaded.
"""

import argparse
import tempfile
from pathlib import Path

import beforehand  # noqa: F401
import peft
import torch
import transformers
from torch import Tensor, nn

from gradproj import GradientProjectionMemory
from gradproj.integrations.huggingface import GradientProjectionCallback

LENGTH = 64  # of a piece of text, bytes
TEXTS = [Path(__file__).resolve().parent.parent / name for name in ("LICENSE", "README.md")]


def pieces(path: Path) -> Tensor:
    """The beginning of a text: (n, LENGTH) tokens."""
    tokens = torch.tensor(list(path.read_bytes()[: 16 * LENGTH]))
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def network() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": LENGTH}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    lora = peft.LoraConfig(r=64, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def learn(model: nn.Module, text: Tensor, n_epochs: int, callbacks: list[transformers.TrainerCallback]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            **{"output_dir": folder, "use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no"},
            **{"learning_rate": 3e-3, "num_train_epochs": n_epochs, "per_device_train_batch_size": 8},
            **{"logging_strategy": "no", "dataloader_pin_memory": False},
        )
        data = [{"input_ids": piece, "labels": piece} for piece in text]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor) -> float:
    return model.eval()(input_ids=text, labels=text).loss.exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--short", action="store_true", help="a few steps, only to see that it runs")
    n_epochs = 2 if parser.parse_args().short else 40
    licence, readme = map(pieces, TEXTS)
    for name in ("naive", "protected"):
        model = network()
        memory = GradientProjectionMemory(model)
        first = GradientProjectionCallback(memory, threshold=0.99, samples=[{"input_ids": licence}])
        second = GradientProjectionCallback(memory, threshold=0.99, remember=False)  # there is no third text
        learn(model, licence, n_epochs, [first] if name == "protected" else [])
        before = perplexity(model, licence)
        learn(model, readme, n_epochs, [second] if name == "protected" else [])
        after, new = perplexity(model, licence), perplexity(model, readme)
        print(f"{name:9} perplexity of the licence {before:.1f}, after the README {after:.1f}; of the README {new:.1f}")
    print(*str(memory.verify(model, {"input_ids": licence})).splitlines()[-2:], sep="\n")


if __name__ == "__main__":
    main()
