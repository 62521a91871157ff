"""TRL's SFTTrainer with an adapter of ours: training, held-out loss, a file that PEFT loads without an import.

python examples/trl_sft.py MODEL DATA.jsonl     # one {"prompt": ..., "completion": ...} a line
"""

import argparse

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.trl import NdLoraCallback


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="A causal language model: a directory, or its name on the hub.")
    parser.add_argument("data")
    parser.add_argument("--output", default="trl-sft-adapter")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    data = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    on_gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        options.model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=4e-4,  # twice LoRA's
            lr_scheduler_type="cosine",
            per_device_train_batch_size=4,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=NdLoraConfig(task_type="CAUSAL_LM"),
        callbacks=[NdLoraCallback()],  # writes the model card; schedules and gradient starts need it
    )
    trainer.model.print_trainable_parameters()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(options.output)
    print(f"held-out loss {before:.3f} before, {after:.3f} after: {options.output}")

    base = AutoModelForCausalLM.from_pretrained(options.model)
    return before, after, PeftModel.from_pretrained(base, options.output)


if __name__ == "__main__":
    main()
