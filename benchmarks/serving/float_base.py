"""A GGUF model in float32: python float_base.py QUANTISED.gguf OUTPUT.gguf.

llama.cpp rounds what goes into a quantised weight, which PEFT does not: only a float32 base gives the same tokens.
"""

import sys

import gguf

quantised, output = sys.argv[1:]
reader = gguf.GGUFReader(quantised)
writer = gguf.GGUFWriter(output, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
for field in reader.fields.values():
    if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
        continue
    value = 0 if field.name == gguf.Keys.General.FILE_TYPE else field.contents()  # 0: all float32
    kind = field.types[0]
    writer.add_key_value(
        field.name, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    )
for tensor in reader.tensors:
    writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
