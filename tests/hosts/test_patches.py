"""Every function of a host that one of ours stands before is still there, and ours stands before it."""

import importlib
import inspect
import pkgutil

import pytest

# a host's module -> ours and the function in it that puts ours there, the host's functions
PATCHES = {
    "transformers": (
        ("trl.callback", "NdLoraCallback"),
        ["transformers.trainer_callback:CallbackHandler.on_train_begin"],
    ),
    "diffusers": (
        ("diffusers.patches", "activate"),
        [
            "diffusers.loaders.peft:PeftAdapterMixin.save_lora_adapter",
            "diffusers.loaders.peft:PeftAdapterMixin.load_lora_adapter",
            "diffusers.loaders.lora_base:LoraBaseMixin.write_lora_layers",
        ],
    ),
    "axolotl.utils.config": (
        ("axolotl.implicit", "activate"), ["axolotl.utils.config:validate_config"],
    ),
    "axolotl.loaders.model": (
        ("axolotl.patches", "let_quantise"),
        [
            "axolotl.loaders.model:ModelLoader._set_quantization_config",
            "axolotl.loaders.model:ModelLoader._prepare_model_for_quantization",
        ],
    ),
    "axolotl.cli.merge_lora": (
        ("axolotl.patches", "merge_by_shards"), ["axolotl.cli.merge_lora:do_merge_lora"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("host", PATCHES)
def test_ours_stand_before_the_hosts_own(host):
    pytest.importorskip(host)
    (module, put), names = PATCHES[host]
    put = getattr(importlib.import_module(f"ndlora_plugins.integrations.{module}"), put)
    put({}) if "cfg" in inspect.signature(put).parameters else put()
    for name in names:
        found = pkgutil.resolve_name(name)
        assert inspect.unwrap(found).__module__.split(".")[0] == host.split(".")[0], name
        assert found.stands_before_a_hosts
