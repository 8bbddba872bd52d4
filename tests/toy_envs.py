"""Gymnasium environments for the tests, reached as toy_envs:Name-v0, and what their datasets are made of."""

import gymnasium
import numpy as np

DIM, RADIUS = 4, 0.5


def unit(rng, n=None):
    x = rng.normal(size=(n or 1, DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x if n else x[0]


def is_paid(s, a):
    """An action pays if it keeps the norm that the data have and points where the observation does."""
    norm = np.linalg.norm(a, axis=-1)
    return (np.abs(norm - RADIUS) < 0.15) & ((s * a).sum(-1) > 0.6 * norm)


def bandit_data(n, seed=0):
    """One-step episodes whose actions lie near a sphere, whatever the observation: about one in eight is paid."""
    rng = np.random.default_rng(seed)
    s, a = unit(rng, n), RADIUS * unit(rng, n) + 0.02 * rng.normal(size=(n, DIM))
    rows = dict(observations=np.zeros((n, 2, DIM)), actions=np.zeros((n, 2, DIM)), rewards=np.zeros((n, 2)),
                terminals=np.tile([0, 1], (n, 1)), masks=np.zeros((n, 2)))
    rows["observations"][:, 0], rows["actions"][:, 0], rows["rewards"][:, 0] = s, a, is_paid(s, a) - 1.0
    return {key: x.reshape(2 * n, *x.shape[2:]) for key, x in rows.items()}


MODES, SHARES = RADIUS * np.eye(DIM)[:3], (0.6, 0.3, 0.1)


def modes_data(n, seed=0):
    """One-step episodes whose actions lie at one of three points, so often."""
    rng = np.random.default_rng(seed)
    data = bandit_data(n, seed)
    data["actions"][::2] = MODES[rng.choice(3, n, p=SHARES)] + 0.02 * rng.normal(size=(n, DIM))
    return data


class Bandit(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (DIM,))
    action_space = gymnasium.spaces.Box(-1, 1, (DIM,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = unit(self.np_random)
        return self.s.astype(np.float32), {}

    def step(self, action):
        paid = is_paid(self.s, action)
        return self.s.astype(np.float32), paid - 1.0, True, False, {"success": bool(paid)}


class Counting(gymnasium.Env):
    """Episodes have numbers: the seed of a reset, or one more than the last. Their lengths, rewards and success follow
    from the number alone; the observation tells number and time."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))  # not [-1, 1]: rescaled
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    reports_success = True

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 48, 3), 4 * self.t, np.uint8)

    def reset(self, *, seed=None, options=None):
        self.n, self.t = self.n + 1 if seed is None else seed, 0
        return np.array([self.n, self.t], np.float32), {}

    @staticmethod
    def length(n):
        return 1 + 7 * n % 13

    def step(self, action):
        self.t += 1
        info = {"success": self.n % 3 == 0} if self.reports_success else {}
        observation = np.array([self.n, self.t], np.float32)
        return observation, float(action[0]), self.t == self.length(self.n), False, info


class Silent(Counting):
    reports_success = False


class Discrete(Counting):
    action_space = gymnasium.spaces.Discrete(3)


class Film(gymnasium.Env):
    """Images of noise that follow from the reset seed and the time; an episode ends after seven steps."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def frame(self):
        return np.random.default_rng((self.seed, self.t)).integers(0, 256, (8, 8, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.seed, self.t = seed, 0
        return self.frame(), {}

    def step(self, action):
        self.t += 1
        return self.frame(), 0.0, False, self.t == 7, {"success": True}


def film_data(episodes):
    """The episodes 0 ... of Film as a dataset, whose actions tell the rows apart."""
    env, frames = Film(), []
    for seed in range(episodes):
        frames += [env.reset(seed=seed)[0], *(env.step(None)[0] for _ in range(7))]
    n = len(frames)
    return dict(observations=np.array(frames), actions=np.linspace(-0.9, 0.9, n)[:, None], rewards=np.ones(n),
                terminals=np.arange(n) % 8 == 7)


for name in ("Bandit", "Counting", "Silent", "Discrete", "Film"):
    gymnasium.register(f"{name}-v0", f"toy_envs:{name}")
