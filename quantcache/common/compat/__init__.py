"""Everything that depends on the version or the inner workings of transformers, by topic."""

from quantcache.common.compat.attention import attention_implementations as attention_implementations
from quantcache.common.compat.attention import can_change_attention as can_change_attention
from quantcache.common.compat.attention import mask_arguments as mask_arguments
from quantcache.common.compat.attention import use_attention as use_attention
from quantcache.common.compat.layers import StockLayerState as StockLayerState
from quantcache.common.compat.layers import is_full_attention as is_full_attention
from quantcache.common.compat.layers import is_placeholder as is_placeholder
from quantcache.common.compat.layers import is_recurrent as is_recurrent
from quantcache.common.compat.layers import is_stateful as is_stateful
from quantcache.common.compat.layers import is_window as is_window
from quantcache.common.compat.layers import restore_stock_layer as restore_stock_layer
from quantcache.common.compat.layers import stock_layer_shapes as stock_layer_shapes
from quantcache.common.compat.layers import stock_layer_state as stock_layer_state
from quantcache.common.compat.layers import tokens_to_remove as tokens_to_remove
from quantcache.common.compat.models import auto_class as auto_class
from quantcache.common.compat.models import input_device as input_device
from quantcache.common.compat.models import is_encoder as is_encoder
from quantcache.common.compat.models import model_id as model_id
from quantcache.common.compat.models import model_revision as model_revision
from quantcache.common.compat.models import position_limit as position_limit
from quantcache.common.compat.models import require_decoder as require_decoder
from quantcache.common.compat.models import versions as versions
from quantcache.common.compat.quantizers import HAS_FP8_CACHE as HAS_FP8_CACHE
from quantcache.common.compat.quantizers import missing_quantizer as missing_quantizer
from quantcache.common.compat.quantizers import quantized_cache as quantized_cache
from quantcache.common.compat.quantizers import quantized_parts as quantized_parts
