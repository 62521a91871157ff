"""`ndlora verify` against a server over HTTP that serves a real model: it tells the adapter from all else."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.main import app
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.serving.self_test import SELF_TEST_FILE, make_self_test
from ndlora_plugins.integrations.serving.verify import verify_server

PROMPTS = [f"w{one} w{other}" for one in range(3, 11) for other in (20, 40)]


def scaled(model, by, layers=lambda name: True):
    """Multiply the LoRA of some layers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and layers(name):
                parameter.mul_(by)


def swapped(model):
    """The rows of q in another order: an export that forgot to permute them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "q_proj" in name:
                parameter.copy_(parameter.flip(0))


def other_adapter(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.3
                )


def nothing(model):
    pass


# what is served: what is done to the exported LoRA, dtype of the model, how it tells log-probabilities -> the verdict
STAGED = {
    "the adapter": (nothing, torch.float32, "ids", "adapter"),
    "the adapter in bfloat16": (nothing, torch.bfloat16, "ids", "adapter"),
    "the adapter in float16": (nothing, torch.float16, "ids", "adapter"),
    "the adapter, tokens as text": (nothing, torch.float32, "text", "adapter"),
    "the adapter, as llama.cpp tells it": (nothing, torch.float32, "chat", "adapter"),
    "the adapter merged": (lambda model: model.merge_adapter(), torch.float32, "ids", "adapter"),
    "the adapter merged in bfloat16": (lambda model: model.merge_adapter(), torch.bfloat16, "ids", "adapter"),
    "the scale off by a hundredth": (lambda model: scaled(model, 1.01), torch.float32, "ids", "adapter"),
    "the base": (lambda model: scaled(model, 0), torch.float32, "ids", "base"),
    "the base in bfloat16": (lambda model: scaled(model, 0), torch.bfloat16, "ids", "base"),
    "the base, as llama.cpp tells it": (lambda model: scaled(model, 0), torch.float32, "chat", "base"),
    "half of the scale": (lambda model: scaled(model, 0.5), torch.float32, "ids", "something else"),
    "twice the scale": (lambda model: scaled(model, 2), torch.float32, "ids", "something else"),
    "the scale's sign": (lambda model: scaled(model, -1), torch.float32, "ids", "something else"),
    "half of the layers": (
        lambda model: scaled(model, 0, lambda name: "layers.0." in name), torch.float32, "ids", "something else",
    ),
    "without the MLP's": (
        lambda model: scaled(model, 0, lambda name: "mlp" in name), torch.float32, "ids", "something else",
    ),
    "attention alone missing": (
        lambda model: scaled(model, 0, lambda name: "self_attn" in name), torch.float32, "ids", "something else",
    ),
    "rows of q in another order": (swapped, torch.float32, "ids", "something else"),
    "another adapter": (other_adapter, torch.float32, "ids", "something else"),
    "another adapter in bfloat16": (other_adapter, torch.bfloat16, "text", "something else"),
}  # fmt: skip
# what a server says (status, body), what the message says
WRONG_SERVERS = {
    "no such model": (404, {"error": "The model `tuned` does not exist."}, ("no model 'tuned'", "'served'")),
    "another protocol": (200, {"result": "hello"}, ("does not speak OpenAI's protocol", "HTTP 200")),
    "no JSON": (200, "<html>", ("does not speak OpenAI's protocol", "<html>")),
    "an error of its own": (500, {"error": "boom"}, ("HTTP 500", "boom")),
    "no log-probabilities": (
        200,
        {"choices": [{"text": "a", "logprobs": None}]},
        ("gives no log-probabilities",),
    ),
    "tokens that nobody knows": (
        200,
        {"choices": [{"text": "a", "logprobs": {"top_logprobs": [{"token_id:9999": -1.0}]}}]},
        ("too few",),
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    """As Llama 2's: alone, tokens read without the space that they begin with."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"▁w{number}": number for number in range(3, 128)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory, make_llama, tokenizer):
    tmp_path = tmp_path_factory.mktemp("exported")
    base = make_llama()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        NdLoraConfig(method="slora", r=4, random_seed=0, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "lora", base=str(tmp_path / "base"), self_test=PROMPTS)
    return tmp_path


@pytest.fixture
def exported(exported_once, tmp_path):
    """A base model that prefers some tokens, an adapter that changes it, and its LoRA with a self-test."""
    return shutil.copytree(exported_once, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def serve():
    """A function: starts a server that answers requests by a function, and gives its address."""
    servers = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def reply(self, status, body):
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.reply(200, {"data": [{"id": "served"}]})

            def do_POST(self):
                self.reply(*answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@torch.inference_mode()
def completion(model, tokenizer, form, request):
    """What an OpenAI server answers: it reads tokens behind those before them."""

    def read(tokens):
        return tokenizer.decode([5, *tokens], skip_special_tokens=True).removeprefix("w5")

    prompt = torch.tensor([request["prompt"]])
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request["max_tokens"],
        do_sample=False,
        pad_token_id=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    likely = found.logits[0][0].float().log_softmax(-1).topk(request["logprobs"])
    pairs = list(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))
    told = {
        "ids": {"top_logprobs": [{f"token_id:{token}": value for token, value in pairs}]},
        "text": {"top_logprobs": [{read([token]): value for token, value in pairs}]},
        "chat": {"content": [{"top_logprobs": [{"id": i, "token": "?", "logprob": v} for i, v in pairs]}]},
    }
    text = read(found.sequences[0, prompt.shape[1] :].tolist())
    return 200, {"choices": [{"text": text, "logprobs": told[form]}]}


@pytest.mark.parametrize("case", STAGED)
def test_what_is_served(case, exported, serve, tokenizer):
    change, dtype, form, expected = STAGED[case]
    base = LlamaForCausalLM.from_pretrained(exported / "base", dtype=dtype)
    model = PeftModel.from_pretrained(base, exported / "lora").to(dtype).eval()
    change(model)
    url = serve(lambda request: completion(model, tokenizer, form, request))
    verdict = verify_server(exported / "lora", url, "tuned")
    assert verdict.serves == expected, verdict


def test_the_command(exported, serve, tokenizer):
    model = LlamaForCausalLM.from_pretrained(exported / "base")
    url = serve(lambda request: completion(model, tokenizer, "ids", request))
    arguments = ["verify", str(exported / "lora"), "--url", url, "--model", "tuned"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "serves the base" in result.output and "First difference: after 'w3 w20'" in result.output
    result = CliRunner().invoke(app, [*arguments, "--json", "--body", '{"seed": 1}'])
    assert json.loads(result.output)["serves"] == "base"


@pytest.mark.parametrize("case", WRONG_SERVERS)
def test_servers_that_cannot_be_asked(case, exported, serve):
    status, body, words = WRONG_SERVERS[case]
    url = serve(lambda request: (status, body))
    with pytest.raises(NdLoraValueError) as caught:
        verify_server(exported / "lora", url, "tuned")
    assert all(word in str(caught.value) for word in words), caught.value


def test_no_server_and_no_self_test(exported, tmp_path):
    with pytest.raises(NdLoraValueError, match="No server answers at http://127.0.0.1:9/v1"):
        verify_server(exported / "lora", "http://127.0.0.1:9/v1", "tuned")
    with pytest.raises(
        NdLoraValueError, match="has no self_test.json: export the adapter again with --self-test"
    ):
        verify_server(exported / "adapter", "http://127.0.0.1:9/v1", "tuned")
    (exported / "lora" / SELF_TEST_FILE).write_text('{"format": 7}')
    with pytest.raises(NdLoraValueError, match="no self-test of format 1: format 7"):
        verify_server(exported / "lora", "http://127.0.0.1:9/v1", "tuned")


def test_an_adapter_that_changes_nothing_has_no_self_test(exported, tmp_path):
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(exported / "base"), LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "fresh")
    with pytest.raises(NdLoraValueError, match="too little for a self-test"):
        make_self_test(tmp_path / "fresh", exported / "base", PROMPTS)
