//! The conversation formats that a user can ask for by name.

/// (names, source); the first name is the one to print.
pub(super) const TEMPLATES: [(&[&str], &str); 10] = [
    (&["llama2"], LLAMA2),
    (&["llama3"], LLAMA3),
    (&["chatml", "qwen", "smollm"], CHATML),
    (&["mistral"], MISTRAL),
    (&["zephyr", "tinyllama"], ZEPHYR),
    (&["phi3"], PHI3),
    (&["gemma"], GEMMA),
    (&["deepseek"], DEEPSEEK),
    (&["vicuna"], VICUNA),
    (&["alpaca"], ALPACA),
];

const LLAMA2: &str = "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}{% if message.role == 'assistant' %}{{ ' ' + message.content|trim + ' ' + eos_token }}{% else %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message.content|trim + ' [/INST]' }}{% endif %}{% endfor %}";

const LLAMA3: &str = "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content|trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const MISTRAL: &str = "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content|trim + '\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}{% if message.role == 'assistant' %}{{ ' ' + message.content|trim + eos_token }}{% else %}{{ '[INST] ' + (system if loop.first else '') + message.content|trim + ' [/INST]' }}{% endif %}{% endfor %}";

const ZEPHYR: &str = "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}";

const PHI3: &str = "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}";

const GEMMA: &str = "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content|trim + '\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + (system if loop.first else '') + message.content|trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}";

const DEEPSEEK: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ 'User: ' + message.content + '\\n\\n' }}{% elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token }}{% else %}{{ message.content + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

const VICUNA: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + '\\n' }}{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token + '\\n' }}{% else %}{{ message.content + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

const ALPACA: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}{% elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}{% else %}{{ message.content + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}";
