"""Model families that are not pruned, and why."""

EXPERTS = "it is a mixture of experts, and no record says yet where its router and its experts are"
STATES = (
    "it has state-space, recurrent or linear-attention layers, and no record says yet what can be removed around them"
)
PLAIN_MLP = "its MLP is not gated, and its projections are not those of a gated decoder (GPT-2 style)"
PARALLEL = "attention and MLP of a layer read the same input side by side, and no record says yet where its weights are"
SHARED = "its layers share keys, values or embeddings with each other, so they cannot leave one by one"
LATENT = "its attention is compressed into a latent space and has no rows per head to remove"
ENCODER_DECODER = "it is an encoder-decoder; only decoders are pruned"
SEVERAL_MODELS = (
    "it is made of several models (text with images or sound); docs/families.md shows how to save its text model alone"
)

FAMILIES_BY_REASON = {
    EXPERTS: """
        flex_olmo phimoe granitemoeshared llama4_text
        dbrx jetmoe dots1 hunyuan_v1_moe minimax exaone_moe afmoe solar_open
    """,
    STATES: """
        mamba mamba2 falcon_mamba zamba zamba2 recurrent_gemma rwkv xlstm olmo_hybrid
    """,
    PLAIN_MLP: "gpt2 gpt_neo gpt_bigcode opt bloom mpt codegen xglm biogpt starcoder2 nemotron persimmon openai-gpt",
    PARALLEL: "gptj falcon",
    SHARED: "gemma3n_text",
    LATENT: "deepseek_v2 minicpm3",
}
REFUSED = {name: reason for reason, names in FAMILIES_BY_REASON.items() for name in names.split()}
