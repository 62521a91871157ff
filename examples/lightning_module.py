"""An adapter in a LightningModule, whose checkpoints hold the adapter and not the base model.

python examples/lightning_module.py MODEL          # a causal language model: a directory, or its name on the hub
"""

import argparse

import lightning
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndlora_plugins import NdLoraConfig

TEXTS = ["Two and two is four.", "Three and two is five.", "Four and two is six.", "Five and two is seven."]


class AdapterModule(lightning.LightningModule):
    """A causal language model with an NDLORA adapter."""

    def __init__(self, model: str, rate: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        # a start that is random draws the same values whenever the checkpoint is loaded
        self.model = get_peft_model(base, NdLoraConfig(task_type="CAUSAL_LM", random_seed=0))

    def training_step(self, batch, index):
        labels = batch["input_ids"].masked_fill(
            batch["attention_mask"] == 0, -100
        )  # nothing is learned of padding
        loss = self.model(**batch, labels=labels).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        trained = [value for value in self.parameters() if value.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams.rate)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = get_peft_model_state_dict(self.model)

    def on_load_checkpoint(self, checkpoint):
        set_peft_model_state_dict(self.model, checkpoint["state_dict"])
        checkpoint["state_dict"] = self.state_dict()  # which Lightning loads once more, the base model too


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--output", default="lightning-adapter")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [dict(row) for row in map(tokenizer, TEXTS)]
    loader = DataLoader(rows, batch_size=4, collate_fn=lambda rows: tokenizer.pad(rows, return_tensors="pt"))

    lightning.seed_everything(0)
    module = AdapterModule(options.model)
    trainer = lightning.Trainer(
        max_steps=options.steps, accelerator="cpu", logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    trainer.save_checkpoint(f"{options.output}.ckpt")  # to go on: trainer.fit(..., ckpt_path=...)
    module.model.save_pretrained(options.output)  # what every other host loads
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    return module, PeftModel.from_pretrained(base, options.output)


if __name__ == "__main__":
    main()
