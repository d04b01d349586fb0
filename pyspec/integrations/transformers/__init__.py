"""pyspec inside transformers, on stock models.

    model.generate(**inputs, custom_generate=pyspec.integrations.transformers.generate)  # speculated
    model.generate(**inputs, cache=GearCache("gear-4bit"))  # quantised keys and values; past_key_values before 5.24
    register_attention(); model.set_attn_implementation("pyspec")  # block masks, tree attention
    fix_mamba_steps(model)  # Mamba-1 that reads several tokens after a cache rightly

Importing this changes nothing in transformers.
"""

from pyspec.integrations import require

require("transformers", "5.20", "6")

from pyspec.integrations.transformers.attention import register_attention  # noqa: E402
from pyspec.integrations.transformers.cache import GearCache, GearLayer  # noqa: E402
from pyspec.integrations.transformers.generation import generate  # noqa: E402
from pyspec.integrations.transformers.mamba import fix_mamba_steps  # noqa: E402
