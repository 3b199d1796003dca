"Training, pre-training, probes. Needs the extra `train`."

from ..runs import needs

needs('torch')
