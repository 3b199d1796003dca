"Encoders, decoders, losses, weights. Needs the extra `train`."

from ..runs import needs

needs('torch')
