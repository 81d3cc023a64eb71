"""The registered model, as code: a base in NF4 with the adapter on top, answering chats and plain prompts.

MLflow keeps this file beside the adapter and runs it where the model is loaded. It therefore imports nothing of this
project, and the heavy libraries only when the model is loaded.

    model = mlflow.pyfunc.load_model("models:/name@candidate")
    model.predict([{"messages": [{"role": "user", "content": "..."}]}])   # a chat, through the chat template
    model.predict([{"messages": [...], "tools": [...]}])                   # with tools, as JSON text or a list
    model.predict([{"prompt": "..."}], params={"max_new_tokens": 64})     # plain text, continued as it is
    model.predict([{"instruction": "...", "input": "..."}])                # Stanford Alpaca's fields, in its prompt

The rows of one call are all of one kind. The base is the one that adapter_config.json names; where it lies
elsewhere, say so with the environment variable QLORA_BASE_MODEL or with
`load_model(..., model_config={"base_model": ...})`.
"""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

BASE_MODEL_VARIABLE = "QLORA_BASE_MODEL"


_models: Any = import_module("mlflow.models")  # Any: half of MLflow's own types are unknown
_pyfunc: Any = import_module("mlflow.pyfunc")


class AdapterModel(_pyfunc.PythonModel):
    """`model` (a PeftModel) and `tokenizer` are there for whoever unwraps it."""

    def load_context(self, context: Any) -> None:
        """Load the base in NF4 with double quantization and put the adapter on it."""
        # Any: what is wanted of these libraries is mostly untyped.
        torch: Any = import_module("torch")
        peft: Any = import_module("peft")
        transformers: Any = import_module("transformers")
        adapter = Path(context.artifacts["adapter"])
        base, revision = _base_model(adapter, context.model_config or {})
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = _auto_class(transformers, base, revision).from_pretrained(
            base,
            revision=revision,
            dtype=torch.bfloat16,
            quantization_config=quantization,
            device_map={"": 0 if torch.cuda.is_available() else "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
        )
        self.model: Any = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(adapter)
        self.ends = _ends(adapter)

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:  # noqa: ARG002
        """One text for each row with `messages` or `prompt`; `context` was used for loading."""
        rows: list[dict[str, Any]] = (
            model_input.to_dict("records") if hasattr(model_input, "to_dict") else list(model_input)
        )
        return [self._answer(self.encode(row), params or {}) for row in rows]

    del predict.__annotations__["model_input"]  # MLflow takes it for a signature, and warns that it is none

    def encode(self, row: dict[str, Any]) -> Any:
        """The tokens of a row, as it was trained up to where the answer begins."""
        messages, prompt, instruction, tools = (
            _given(row.get(name)) for name in ("messages", "prompt", "instruction", "tools")
        )
        if sum(given is not None for given in (messages, prompt, instruction)) != 1:
            raise ValueError(
                "give each row one of `messages` (a chat), `prompt` (text to continue) and `instruction` (of Alpaca)"
            )
        if messages is None:
            return self._continued(prompt if instruction is None else _alpaca({**row, "instruction": instruction}))
        return self.tokenizer.apply_chat_template(
            [_message(dict(message)) for message in messages],
            tools=[_parsed(tool) for tool in _parsed(tools) or ()] or None,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )

    def _continued(self, text: str) -> Any:
        """A text as it was trained: with the token that begins texts, if there is one, and none that ends them."""
        begins = self.tokenizer("a")["input_ids"][:1]
        encoded = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = encoded["input_ids"]
        if begins == [self.tokenizer.bos_token_id] and ids[0, :1].tolist() != begins:
            torch: Any = import_module("torch")
            ids = torch.cat([torch.tensor([begins]), ids.long()], dim=1)
        return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}

    def _answer(self, encoded: Any, params: dict[str, Any]) -> str:
        temperature = float(params["temperature"])
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        return self.generate(encoded, max_new_tokens=int(params["max_new_tokens"]), **sampling)

    def generate(self, encoded: Any, **options: Any) -> str:
        """The text that follows; `options` are those of transformers' `generate`, of which greedy is the default."""
        torch: Any = import_module("torch")

        inputs = {key: encoded[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            generated = self.model.generate(
                **inputs,
                **{"do_sample": False, **self.ends, **options},
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        continuation = generated[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(continuation, skip_special_tokens=True).strip()


REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
ALPACA_PAIRED = ", paired with an input that provides further context"


def _alpaca(row: dict[str, Any]) -> str:
    """Stanford's prompt, up to where the answer begins."""
    context, system = (_given(row.get(name)) or "" for name in ("input", "system"))
    paired = f"\n\n### Input:\n{context}" if context.strip() else ""
    start = f"### System:\n{system}\n\n" if system.strip() else ALPACA_PREAMBLE.format(ALPACA_PAIRED if paired else "")
    rounds = _parsed(_given(row.get("history")) or [])
    earlier = "".join(f"### Instruction:\n{asked}\n\n### Response:{said}\n\n" for asked, said in rounds)
    return f"{start}{earlier}### Instruction:\n{row['instruction']}{paired}\n\n### Response:"


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """A message as it was trained: nulls are absent, the content is a text, tool arguments are objects."""
    message = {key: value for key, value in given.items() if _given(value) is not None and key != "weight"}
    for name in {"name", "tool_call_id", *REASONING_FIELDS} & message.keys():
        if not message[name].strip():
            del message[name]
    content = message.get("content", "")
    message["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if calls := _parsed(message.pop("tool_calls", None)):
        message["tool_calls"] = [_tool_call(dict(call)) for call in calls]
    return message


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    function["arguments"] = _parsed(function.get("arguments")) or {}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _parsed(value: Any) -> Any:
    """The value behind JSON text; anything else is a value already."""
    return json.loads(value) if isinstance(value, str) and value.strip() else value


def _given(value: Any) -> Any:
    """None for what a table has in place of a value."""
    return None if isinstance(value, float) and value != value else value


def _ends(adapter: Path) -> dict[str, Any]:
    """The tokens that generation ends with."""
    file = adapter / "generation_config.json"
    ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return {"eos_token_id": ids} if ids else {}


def _auto_class(transformers: Any, base: str, revision: str | None) -> Any:
    """What loads the whole of a model, in which the adapter has its names: images' part and all, where there is one."""
    config = transformers.AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    whole = transformers.AutoModelForImageTextToText
    holds_text_model = "text_config" in config.sub_configs and type(config) in whole._model_mapping
    return whole if holds_text_model else transformers.AutoModelForCausalLM


def _base_model(adapter: Path, model_config: dict[str, Any]) -> tuple[str, str | None]:
    """Path or hub id of the base, and its revision where the adapter's own description is followed."""
    elsewhere = os.environ.get(BASE_MODEL_VARIABLE) or model_config.get("base_model")
    if elsewhere:
        return elsewhere, None
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config.get("revision")


_models.set_model(AdapterModel())
