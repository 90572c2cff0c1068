"""Fine-tune MiniLM with the Hugging Face Trainer: from which package is a docstring?

The model comes from a package, the text from the standard library: nothing is downloaded. Needs
adaptlr[demo,transformers]. A minute for 100 steps on two cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from adaptlr.cli.demo_task import MODEL_FOLDER, Examples, load_task
from adaptlr.integrations.transformers import attach


def rows(examples: Examples) -> list[dict[str, object]]:
    """Return what the Trainer takes; 0 is padding."""
    pairs = zip(examples.tokens, examples.labels, strict=True)
    return [{"input_ids": t, "attention_mask": (t != 0).long(), "labels": y} for t, y in pairs]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()

    task = load_task()
    model = AutoModelForSequenceClassification.from_pretrained(
        str(MODEL_FOLDER), num_labels=len(task.packages)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            per_device_train_batch_size=32,
            logging_steps=10,
            logging_nan_inf_filter=False,  # on a GPU this filter waits in every step
            report_to="none",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows(task.train),
            eval_dataset=rows(task.held_out),
            compute_metrics=accuracy,
        )
        callback = attach(trainer)  # the one line
        trainer.train()
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}, chance {task.chance:.3f}")
    for event in callback.controller.events():
        print(f"step {event.step}: {event.reason}")


if __name__ == "__main__":
    main()
