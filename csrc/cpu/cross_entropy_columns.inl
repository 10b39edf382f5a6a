// Cross entropy of rows whose classes are not contiguous in memory, such as those of pixels (included by
// kernels.inl). Each lane of a vector holds the same class of another row. A block of the classes of a tile
// of rows is copied to a buffer that stays cached. Without the copy, strides of a power of two would map the
// classes to the same cache sets, and they would evict each other.

constexpr int64_t kTileClasses = 64;

using TileBlock = float[kTileClasses][kTile];

// Calls use(offset, r, run) for the runs of rows that lie in one sample: the offset of the first class of its
// first row, the index of this row in the tile, and the number of rows.
template <class Use>
BATCHKERN_INLINE void each_run(const RowLayout& at, int64_t first, int64_t rows, Use use) {
    for (int64_t r = 0; r < rows;) {
        const int64_t left = at.inner - (first + r) % at.inner;
        const int64_t run = left < rows - r ? left : rows - r;
        use(row_offset(at, first + r), r, run);
        r += run;
    }
}

// Loads the classes from c0 on of the rows from `first` on. The other elements of the block are not written.
template <class T>
void load_block(const void* data, const RowLayout& at, int64_t first, int64_t rows, int64_t c0,
                int64_t classes, TileBlock& z) {
    each_run(at, first, rows, [&](int64_t offset, int64_t r, int64_t run) {
        const T* from = static_cast<const T*>(data) + offset + c0 * at.step;
        if (at.row == 1 && run == kTile) {
            for (int64_t c = 0; c < classes; ++c) {
                BATCHKERN_SIMD()
                for (int64_t j = 0; j < kTile; ++j) z[c][j] = load(from + c * at.step + j);
            }
        } else {
            for (int64_t c = 0; c < classes; ++c)
                for (int64_t j = 0; j < run; ++j) z[c][r + j] = load(from + c * at.step + j * at.row);
        }
    });
}

template <class T>
void store_block(const TileBlock& z, void* data, const RowLayout& at, int64_t first, int64_t rows, int64_t c0,
                 int64_t classes) {
    each_run(at, first, rows, [&](int64_t offset, int64_t r, int64_t run) {
        T* to = static_cast<T*>(data) + offset + c0 * at.step;
        if (at.row == 1 && run == kTile) {
            for (int64_t c = 0; c < classes; ++c) {
                BATCHKERN_SIMD()
                for (int64_t j = 0; j < kTile; ++j) store(to + c * at.step + j, z[c][j]);
            }
        } else {
            for (int64_t c = 0; c < classes; ++c)
                for (int64_t j = 0; j < run; ++j) store(to + c * at.step + j * at.row, z[c][r + j]);
        }
    });
}

template <class T>
BATCHKERN_INLINE void load_probabilities(const Probabilities& q, int64_t first, int64_t rows, int64_t c0,
                                         int64_t classes, TileBlock& to) {
    if (q.are_float)
        load_block<float>(q.data, q.at, first, rows, c0, classes, to);
    else
        load_block<T>(q.data, q.at, first, rows, c0, classes, to);
}

// Sums over the classes of each row of a tile, one lane per row.
struct TileSums {
    float maximum[kTile];
    double sum[kTile];
    float at_target[kTile];
    double mass[kTile];
    double dot[kTile];
};

// Raises the maximum m of each row to that of the block, rescales its sum, and adds exp(z - m) of the block.
BATCHKERN_INLINE void add_to_tile(const TileBlock& z, int64_t classes, TileSums& t) {
    for (int64_t first = 0; first < kTile; first += kLanes) {
        float highest[kLanes], base[kLanes];
        double sum[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) highest[r] = t.maximum[first + r];
        for (int64_t c = 0; c < classes; ++c) {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < kLanes; ++r)
                highest[r] = z[c][first + r] > highest[r] ? z[c][first + r] : highest[r];
        }
        BATCHKERN_SIMD()
        for (int64_t r = 0; r < kLanes; ++r) {
            base[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
            // As long as the maximum is -inf, the sum is 0 or NaN, and the product is the same.
            sum[r] = t.sum[first + r] * exp_sum<1>(t.maximum + first + r, 1, base[r], 1.0f);
            t.maximum[first + r] = highest[r];
        }
        add_exponentials(z[0] + first, kTile, classes, base, sum);
        for (int64_t r = 0; r < kLanes; ++r) t.sum[first + r] = sum[r];
    }
}

// The entropies of a tile's rows and whether their predictions are correct, by a second pass over the tile.
template <class T>
void describe_tile(const LossRows& a, const CrossEntropyOptions& o, int64_t first, int64_t rows,
                   const TileSums& t, const double* log_sums, TileBlock& z, TileBlock& q) {
    double entropy[kTile] = {};
    float highest[kTile];
    int64_t place[kTile], target[kTile] = {};
    for (int64_t r = 0; r < kTile; ++r) {
        highest[r] = -INFINITY;
        place[r] = -1;
    }
    for (int64_t c0 = 0; c0 < o.classes; c0 += kTileClasses) {
        const int64_t classes = o.classes - c0 < kTileClasses ? o.classes - c0 : kTileClasses;
        load_block<T>(a.logits, a.at, first, rows, c0, classes, z);
        if (a.probabilities.data) load_probabilities<T>(a.probabilities, first, rows, c0, classes, q);
        for (int64_t c = 0; c < classes; ++c) {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < kTile; ++r) {
                const float log_p = (z[c][r] - t.maximum[r]) - static_cast<float>(log_sums[r]);
                const float p = exp_nonpositive(log_p);
                entropy[r] -= p == 0 ? 0.0f : p * log_p;
            }
            for (int64_t r = 0; r < rows; ++r) {
                if (place[r] < 0 && z[c][r] == t.maximum[r]) place[r] = c0 + c;
                if (a.probabilities.data && q[c][r] > highest[r]) {
                    highest[r] = q[c][r];
                    target[r] = c0 + c;
                }
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        a.entropy[i] = static_cast<float>(entropy[r]);
        if (!a.probabilities.data) target[r] = class_of(a.target, i);
        a.correct[i] = place[r] == target[r] && log_sums[r] == log_sums[r];
        if (is_ignored(a.probabilities, a.target, i, o)) ignore_row(a, i);
    }
}

BATCHKERN_INLINE void load_targets(const ClassIndices& target, int64_t first, int64_t rows, int64_t* to) {
    with_indices(target, [&](auto* from) {
        for (int64_t r = 0; r < rows; ++r) to[r] = static_cast<int64_t>(from[first + r]);
    });
}

// Whether the loss of a row is its log-sum-exp minus the logit of its target.
BATCHKERN_INLINE bool is_plain(const CrossEntropyOptions& o, bool soft) {
    return !soft && !o.class_weight && o.smoothing == 0;
}

template <class T>
void loss_columns(const LossRows& a, const CrossEntropyOptions& o) {
    const bool soft = a.probabilities.data != nullptr;
    const auto keep = static_cast<float>(1 - o.smoothing), level = static_cast<float>(o.smooth);
    const bool sums_target = soft || o.smoothing > 0;
    const bool plain = is_plain(o, soft) && !a.entropy;
    alignas(64) TileBlock z = {}, q = {};  // the results of lanes without a row are not used
    alignas(64) TileSums t = {};
    for (int64_t first = a.begin; first < a.end; first += kTile) {
        const int64_t rows = a.end - first < kTile ? a.end - first : kTile;
        int64_t target[kTile];
        bool any = soft;
        if (!soft) load_targets(a.target, first, rows, target);
        for (int64_t r = 0; r < rows && !soft; ++r) any |= target[r] != o.ignore_index;
        if (!any) {
            for (int64_t r = 0; r < rows; ++r) ignore_row(a, first + r);
            continue;
        }
        for (int64_t r = 0; r < kTile; ++r) {
            t.maximum[r] = -INFINITY;
            t.sum[r] = 0;
        }
        if (sums_target)
            for (int64_t r = 0; r < kTile; ++r) t.mass[r] = t.dot[r] = 0;
        for (int64_t c0 = 0; c0 < o.classes; c0 += kTileClasses) {
            const int64_t classes = o.classes - c0 < kTileClasses ? o.classes - c0 : kTileClasses;
            load_block<T>(a.logits, a.at, first, rows, c0, classes, z);
            add_to_tile(z, classes, t);
            if (soft) {
                load_probabilities<T>(a.probabilities, first, rows, c0, classes, q);
                for (int64_t c = 0; c < classes; ++c) {
                    const float weight = o.class_weight ? o.class_weight[c0 + c] : 1.0f;
                    BATCHKERN_SIMD()
                    for (int64_t r = 0; r < kTile; ++r) {
                        const double x = smoothed(q[c][r], weight, keep, level);
                        t.mass[r] += x;
                        t.dot[r] += x * z[c][r];
                    }
                }
                continue;
            }
            for (int64_t r = 0; r < rows; ++r) {
                if (target[r] >= c0 && target[r] < c0 + classes) t.at_target[r] = z[target[r] - c0][r];
            }
            for (int64_t c = 0; o.smoothing > 0 && c < classes; ++c) {
                const double weight = o.class_weight ? o.class_weight[c0 + c] : 1.0;
                BATCHKERN_SIMD()
                for (int64_t r = 0; r < kTile; ++r) t.dot[r] += weight * z[c][r];
            }
        }
        double log_sum[kTile];
        float loss[kTile];
        BATCHKERN_SIMD()
        for (int64_t r = 0; r < kTile; ++r) log_sum[r] = log_nonnegative(t.sum[r]);
        if (is_plain(o, soft)) {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < kTile; ++r)
                loss[r] =
                    static_cast<float>(log_sum[r] + (static_cast<double>(t.maximum[r]) - t.at_target[r]));
        }
        if (plain) {
            for (int64_t r = 0; r < rows; ++r) {
                const bool ignored = target[r] == o.ignore_index;
                a.losses[first + r] = ignored ? 0.0f : loss[r];
                a.lse[2 * (first + r)] = ignored ? 0.0f : t.maximum[r];
                a.lse[2 * (first + r) + 1] = ignored ? 0.0f : static_cast<float>(log_sum[r]);
            }
            continue;
        }
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t i = first + r;
            if (!soft && target[r] == o.ignore_index) {
                ignore_row(a, i);
                continue;
            }
            float* const state = a.lse + (soft ? 3 : 2) * i;
            state[0] = t.maximum[r];
            state[1] = static_cast<float>(log_sum[r]);
            if (soft) {
                state[2] = static_cast<float>(t.mass[r]);
                loss[r] = static_cast<float>(soft_loss({t.mass[r], t.dot[r]}, t.maximum[r], log_sum[r]));
            } else if (!is_plain(o, soft)) {
                loss[r] = static_cast<float>(
                    hard_loss(o, target[r], t.maximum[r], log_sum[r], t.at_target[r], t.dot[r]));
            }
            a.losses[i] = loss[r];
        }
        if (a.entropy) describe_tile<T>(a, o, first, rows, t, log_sum, z, q);
    }
}

// Loads some rows of a tile, each at its own offset.
template <class T>
void gather_block(const void* data, int64_t step, const int64_t* offset, int64_t rows, int64_t c0,
                  int64_t classes, TileBlock& z) {
    const T* from = static_cast<const T*>(data) + c0 * step;
    for (int64_t c = 0; c < classes; ++c)
        for (int64_t r = 0; r < rows; ++r) z[c][r] = load(from + c * step + offset[r]);
}

template <class T>
void scatter_block(const TileBlock& z, void* data, int64_t step, const int64_t* offset, int64_t rows,
                   int64_t c0, int64_t classes) {
    T* to = static_cast<T*>(data) + c0 * step;
    for (int64_t c = 0; c < classes; ++c)
        for (int64_t r = 0; r < rows; ++r) store(to + c * step + offset[r], z[c][r]);
}

// The rows of a tile that have a gradient, one lane per row, and the terms of their RowGradient. With a
// target of probabilities, `level` is its `factor`.
struct TileGradient {
    int64_t rows;
    int64_t place[kTile];  // in the tile
    int64_t target[kTile];
    float maximum[kTile], log_sum[kTile], total[kTile], level[kTile], peak[kTile];
};

// Replaces the logits z of some classes of `lanes` rows by their gradient (see RowGradient), without the
// peak.
BATCHKERN_INLINE void block_gradient(const TileGradient& g, const CrossEntropyOptions& o, int64_t lanes,
                                     int64_t c0, int64_t classes, const TileBlock* q, TileBlock& z) {
    const auto keep = static_cast<float>(1 - o.smoothing), uniform = static_cast<float>(o.smooth);
    const bool weighs = o.class_weight && (q || o.smoothing > 0);
    for (int64_t c = 0; c < classes; ++c) {
        const float weight = weighs ? o.class_weight[c0 + c] : 1.0f;
        if (q) {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < lanes; ++r) {
                const float p = exp_nonpositive((z[c][r] - g.maximum[r]) - g.log_sum[r]);
                z[c][r] = g.total[r] * p - g.level[r] * smoothed((*q)[c][r], weight, keep, uniform);
            }
        } else {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < lanes; ++r) {
                const float p = exp_nonpositive((z[c][r] - g.maximum[r]) - g.log_sum[r]);
                z[c][r] = g.total[r] * p - g.level[r] * weight;
            }
        }
    }
}

// The rows of a tile that have a gradient.
void find_gradients(const GradRows& a, const CrossEntropyOptions& o, int64_t first, int64_t rows,
                    TileGradient& g) {
    g.rows = 0;
    for (int64_t r = 0; r < rows; ++r) {
        RowGradient row;
        if (!row_gradient(a, o, first + r, &row)) continue;
        const int64_t n = g.rows++;
        g.place[n] = r;
        g.target[n] = row.target;
        g.maximum[n] = row.maximum;
        g.log_sum[n] = row.log_sum;
        g.total[n] = row.total;
        g.level[n] = a.probabilities.data ? row.factor : row.level;
        g.peak[n] = row.peak;
    }
}

// The same for plain rows (see is_plain), without a branch on the values of a row.
void find_plain_gradients(const GradRows& a, const CrossEntropyOptions& o, int64_t first, int64_t rows,
                          TileGradient& g) {
    const Upstream& u = a.upstream;
    int64_t target[kTile];
    float factor[kTile] = {}, lse_factor[kTile] = {};
    load_targets(a.target, first, rows, target);
    if (u.kept) {
        for (int64_t r = 0; r < rows; ++r) factor[r] = u.kept[first + r] ? u.scale : 0.0f;
    } else {
        for (int64_t r = 0; r < rows && u.loss; ++r) factor[r] = u.loss[(first + r) * u.loss_stride];
        for (int64_t r = 0; r < rows && u.lse; ++r) lse_factor[r] = u.lse[(first + r) * u.lse_stride];
        for (int64_t r = 0; r < rows; ++r) {
            const bool ignored = target[r] == o.ignore_index;
            factor[r] = ignored ? 0.0f : factor[r];
            lse_factor[r] = ignored ? 0.0f : lse_factor[r];
        }
    }
    int64_t n = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t column = target[r] - a.first_class;
        g.place[n] = r;
        g.target[n] = column < a.columns ? column : -1;  // a negative column is not among them either
        g.maximum[n] = a.lse[2 * (first + r)];
        g.log_sum[n] = a.lse[2 * (first + r) + 1];
        g.total[n] = factor[r] + lse_factor[r];
        g.level[n] = 0.0f;
        g.peak[n] = factor[r];
        n += (factor[r] != 0) | (lse_factor[r] != 0);
    }
    g.rows = n;
}

template <class T>
void grad_columns(const GradRows& a, const CrossEntropyOptions& o) {
    const Probabilities& probabilities = a.probabilities;
    const bool plain = is_plain(o, probabilities.data != nullptr);
    alignas(64) TileBlock z = {}, q = {};
    alignas(64) const TileBlock zeros = {};
    alignas(64) TileGradient g = {};
    for (int64_t first = a.begin; first < a.end; first += kTile) {
        const int64_t rows = a.end - first < kTile ? a.end - first : kTile;
        if (plain)
            find_plain_gradients(a, o, first, rows, g);
        else
            find_gradients(a, o, first, rows, g);
        const bool all = g.rows == kTile;
        int64_t from[kTile], from_q[kTile], to[kTile];
        for (int64_t n = 0; n < g.rows && !all; ++n) {
            from[n] = row_offset(a.at, first + g.place[n]);
            to[n] = row_offset(a.grad_at, first + g.place[n]);
            if (probabilities.data) from_q[n] = row_offset(probabilities.at, first + g.place[n]);
        }
        const int64_t lanes = (g.rows + kLanes - 1) / kLanes * kLanes;
        for (int64_t c0 = 0; c0 < a.columns; c0 += kTileClasses) {
            const int64_t classes = a.columns - c0 < kTileClasses ? a.columns - c0 : kTileClasses;
            if (all)
                load_block<T>(a.logits, a.at, first, rows, c0, classes, z);
            else
                gather_block<T>(a.logits, a.at.step, from, g.rows, c0, classes, z);
            if (probabilities.data && all)
                load_probabilities<T>(probabilities, first, rows, c0, classes, q);
            else if (probabilities.data && probabilities.are_float)
                gather_block<float>(probabilities.data, probabilities.at.step, from_q, g.rows, c0, classes,
                                    q);
            else if (probabilities.data)
                gather_block<T>(probabilities.data, probabilities.at.step, from_q, g.rows, c0, classes, q);
            // Only after the logits were read, because the gradient may overwrite them.
            if (!all && !a.grad_is_zero) store_block<T>(zeros, a.grad, a.grad_at, first, rows, c0, classes);
            if (g.rows == 0) continue;
            block_gradient(g, o, lanes, c0, classes, probabilities.data ? &q : nullptr, z);
            for (int64_t n = 0; n < g.rows; ++n) {
                const int64_t c = g.target[n] - c0;
                if (g.target[n] >= 0 && c >= 0 && c < classes) z[c][n] -= g.peak[n];
            }
            if (all)
                store_block<T>(z, a.grad, a.grad_at, first, rows, c0, classes);
            else
                scatter_block<T>(z, a.grad, a.grad_at.step, to, g.rows, c0, classes);
        }
    }
}
