"""llama.cpp's server with adapters: python llamacpp_server.py BASE.gguf PORT ADAPTER.gguf ... (needs xllamacpp)."""

import sys
import time

import xllamacpp

base, port, *adapters = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = base, ["127.0.0.1"], int(port)
params.n_parallel, params.n_ctx, params.cpuparams.n_threads, params.warmup = 1, 512, 2, False
loras = []
for path in adapters:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = path, 0.0
    loras.append(lora)
params.lora_adapters = loras
server = xllamacpp.Server(params)
print(f"ready at {server.listening_address}", flush=True)
while True:
    time.sleep(1)
