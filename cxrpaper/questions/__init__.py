"What is asked of a trained model. Needs the extra `train`."

from ..runs import needs

needs('torch')
