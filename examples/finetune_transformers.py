"""Fine-tune a transformers model with Trainer, its norms swapped by one line.

    python examples/finetune_transformers.py            # a minute or two on two cores
    python examples/finetune_transformers.py --small    # seconds

Nothing is downloaded: a small Llama is made from a configuration, and its task is to continue
counting. With a model of yours, put ``AutoModelForCausalLM.from_pretrained(...)`` in its place.
Parameters keep their names, so what is saved loads into the model without fused-rmsnorm, too.

Needs: pip install transformers accelerate
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_rmsnorm import replace_rms_norm_

VOCABULARY = 64


class Counting(Dataset):
    """Sequences start, start + step, start + 2 step, … modulo the vocabulary."""

    def __init__(self, length: int, count: int) -> None:
        random = torch.Generator().manual_seed(0)
        start = torch.randint(VOCABULARY, (count, 1), generator=random)
        step = torch.randint(1, 8, (count, 1), generator=random)
        self.tokens = (start + step * torch.arange(length)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def make_model(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    small = parser.parse_args().small
    width, length, steps = (32, 16, 12) if small else (512, 128, 100)

    model = make_model(width)
    swapped = replace_rms_norm_(model)
    print(f"swapped {len(swapped)} norms, first {next(iter(swapped.items()))}")

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=Counting(length, 8 * steps))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model(folder)
        plain = LlamaForCausalLM.from_pretrained(folder)  # its own norms
    tokens = Counting(length, 1).tokens
    with torch.no_grad():
        difference = plain(tokens).logits - model.cpu().eval()(tokens).logits
    print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")
    print(f"largest difference of the saved model without the swap: {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()
