"""NDLORA in ms-swift: `swift sft --tuner_type ndlora`.

Nothing is to be imported for it. Where `NDLORA_AUTOLOAD=0` or `TORCH_DEVICE_BACKEND_AUTOLOAD=0` is set,
`--external_plugins FILE.py` does it, with a file that says `import ndlora_plugins`.
"""
