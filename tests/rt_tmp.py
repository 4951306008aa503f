from restyle_deploy.models.restyle import RestyleModel
from tests.toy import toy_model
reveal_type(toy_model().decoder)
reveal_type(toy_model().decoder.n_styles)
