"""A training loop without a trainer: an adapter, AdamW, a file that PEFT loads without an import of this package.

python examples/plain_loop.py MODEL          # a causal language model: a directory, or its name on the hub
"""

import argparse

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndlora_plugins import NdLoraConfig

TEXTS = ["Two and two is four.", "Three and two is five.", "Four and two is six.", "Five and two is seven."]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--output", default="plain-loop-adapter")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = get_peft_model(base, NdLoraConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    model.train()
    for _ in range(options.steps):
        loss = model(**batch, labels=labels).loss
        # a method that asks for a penalty on its factors: loss = loss + model.base_model.penalty()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(options.output)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last: {options.output}")

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, options.output)  # is_trainable=True to go on
    with torch.no_grad():
        found, expected = loaded.eval()(**batch).logits, model.eval()(**batch).logits
    torch.testing.assert_close(found, expected)
    return losses


if __name__ == "__main__":
    main()
